// A loop over independent tasks on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace gcfast {

// Calls body(i) once for every i in [0, count), in no particular order, on up to `threads` threads
// (the caller's is one of them). The first exception is rethrown here once all threads have left
// the loop; tasks that have not started by then are dropped.
//
// The caller does not wait for a thread that has not started when the tasks are done: on a busy
// machine that may take longer than the tasks.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  struct Loop {
    std::atomic<std::int64_t> next{0};
    std::mutex mutex;  // of what follows
    std::condition_variable left;
    int inside = 0;
    bool over = false;
    std::exception_ptr error;
  };
  const auto loop = std::make_shared<Loop>();
  const auto run = [count, &body](Loop& shared) {
    for (std::int64_t i = shared.next++; i < count; i = shared.next++) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(shared.mutex);
        if (!shared.error) shared.error = std::current_exception();
        shared.next = count;
      }
    }
  };
  const auto help = [loop, run] {
    {
      const std::lock_guard<std::mutex> lock(loop->mutex);
      if (loop->over) return;  // and `body` is gone
      ++loop->inside;
    }
    run(*loop);
    const std::lock_guard<std::mutex> lock(loop->mutex);
    --loop->inside;
    loop->left.notify_one();
  };
  const std::int64_t workers = std::min<std::int64_t>(threads, count);
  try {
    for (std::int64_t i = 1; i < workers; ++i) std::thread(help).detach();
  } catch (const std::system_error&) {
    // No more threads: those that there are do the work.
  }
  run(*loop);
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->over = true;
  loop->left.wait(lock, [&] { return loop->inside == 0; });
  // Not left behind: a thread that starts late would destroy it.
  if (const auto error = std::exchange(loop->error, nullptr)) std::rethrow_exception(error);
}

}  // namespace gcfast
