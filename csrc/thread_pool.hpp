// Threads that stay, for loops too short to start threads for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gcfast {

// Helpers of one owner, started when a loop first wants them and joined by the destructor. Several
// threads may call `run`: one loop at a time has the helpers, the others run on their caller alone
// (the cores are taken then anyway).
class ThreadPool {
 public:
  // `threads` counts the caller's: 1 never starts another.
  explicit ThreadPool(int threads) : threads_(threads) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
  }

  // Calls body(i) once for every i in [0, count), in no particular order. The first exception is
  // rethrown here when all threads are out of the loop; tasks that have not started are dropped.
  void run(std::int64_t count, const std::function<void(std::int64_t)>& body) {
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (threads_ <= 1 || count <= 1 || !turn.try_lock()) {
      for (std::int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    while (static_cast<int>(helpers_.size()) < threads_ - 1)
      helpers_.emplace_back([this] { help(); });
    Loop loop{&body, count};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      ++generation_;
    }
    wake_.notify_all();
    loop.run();
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ = nullptr;  // who wakes up only now finds nothing to do
    done_.wait(lock, [this] { return inside_ == 0; });
    if (loop.error) std::rethrow_exception(loop.error);
  }

 private:
  struct Loop {
    const std::function<void(std::int64_t)>* body;
    std::int64_t count;
    std::atomic<std::int64_t> next{0};
    std::mutex error_mutex{};
    std::exception_ptr error{};

    void run() {
      for (std::int64_t i = next++; i < count; i = next++) {
        try {
          (*body)(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(error_mutex);
          if (!error) error = std::current_exception();
          next = count;
        }
      }
    }
  };

  void help() {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stopping_ || (loop_ != nullptr && generation_ != seen); });
      if (stopping_) return;
      seen = generation_;
      Loop* const loop = loop_;
      ++inside_;
      lock.unlock();
      loop->run();
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  const int threads_;
  std::mutex turn_;  // held by the caller whose loop has the helpers
  std::vector<std::thread> helpers_;
  std::mutex mutex_;  // of what follows
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  std::uint64_t generation_ = 0;
  int inside_ = 0;
  bool stopping_ = false;
};

}  // namespace gcfast
