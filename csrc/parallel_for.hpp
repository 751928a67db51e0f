// A loop over independent tasks on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gcfast {

// Calls body(i) once for every i in [0, count), in no particular order, on up to `threads` threads
// (the caller's is one of them). The first exception is rethrown here when all threads have ended;
// tasks that have not started by then are dropped.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  const int workers = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), count));
  if (workers <= 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto run = [&] {
    for (std::int64_t i = next++; i < count; i = next++) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next = count;
      }
    }
  };
  // Joined by the destructor, so that a thread that cannot be started does not abandon the others.
  struct Pool {
    std::vector<std::thread> threads;
    ~Pool() {
      for (auto& thread : threads) thread.join();
    }
  };
  {
    Pool pool;
    pool.threads.reserve(static_cast<std::size_t>(workers - 1));
    for (int i = 1; i < workers; ++i) pool.threads.emplace_back(run);
    run();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace gcfast
