// A disk that fails: from the n-th call on that changes a file below a folder, calls return an error.
// Meanwhile the clock jumps ten years back or forth whenever it is read.
// Preloaded into the process of tests/failing_disk.py, which arms it after a fork.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long left = LONG_MAX; // calls that still succeed
static long calls = 0;
static int failure = 0;
static char folder[PATH_MAX];

void disk_fails_after(long successes, int code, const char *below) {
    snprintf(folder, sizeof folder, "%s", below);
    calls = 0;
    left = successes;
    failure = code;
}

long disk_calls(void) { return calls; }

static int fails(const char *path) {
    if (failure == 0 || strncmp(path, folder, strlen(folder)) != 0) return 0;
    if (calls++ < left) return 0;
    errno = failure;
    return 1;
}

static int fails_on(int file) {
    char link[64], path[PATH_MAX];
    if (failure == 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = '\0';
    return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *content, size_t size) {
    return fails_on(file) ? -1 : REAL(write)(file, content, size);
}
ssize_t pwrite64(int file, const void *content, size_t size, off64_t at) {
    return fails_on(file) ? -1 : REAL(pwrite64)(file, content, size, at);
}
int fsync(int file) { return fails_on(file) ? -1 : REAL(fsync)(file); }
int ftruncate64(int file, off64_t size) { return fails_on(file) ? -1 : REAL(ftruncate64)(file, size); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static const long years = 10L * 365 * 24 * 3600;
    static long reading = 0;
    int status = REAL(clock_gettime)(clock, now);
    if (failure != 0 && clock == CLOCK_REALTIME) now->tv_sec += reading++ % 2 ? years : -years;
    return status;
}
