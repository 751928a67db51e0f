// One build for every x86-64: the loader takes the widest version of a function that the processor
// has. Where CMakeLists.txt does not say otherwise, no version may fuse a multiplication with an
// addition, so all of them give the same bits.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define GCFAST_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define GCFAST_CLONES
#endif
