// From embeddings to the channel weights of their nearest rows, in the background if wanted. The
// index is whatever a function says is near; nothing here knows of Python or of FAISS.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "gather_rows.hpp"
#include "table.hpp"

namespace gcfast {

// The engine, or a ticket of it, was used in a process that was forked from its own.
struct UsedAfterFork : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct EngineClosed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Writes the ids [n, k] of rows near each query [n, dim], -1 where it finds fewer, and distances of
// its own, which are not used. It may be called by several threads at once.
using SearchFunction = std::function<void(std::int64_t n, const float* queries, std::int64_t k,
                                          float* distances, std::int64_t* ids)>;

// One batch under way.
class Ticket {
 public:
  bool wait_for(std::chrono::milliseconds time);  // whether it has ended
  // What came of it, once it has ended: the result, or the worker's exception, each time.
  const std::shared_ptr<TransferResult>& result() const;

 private:
  friend class TransferEngine;
  void end(std::shared_ptr<TransferResult> result, std::exception_ptr error);

  mutable std::mutex mutex_;
  std::condition_variable ended_;
  bool has_ended_ = false;
  std::shared_ptr<TransferResult> result_;
  std::exception_ptr error_;
};

// A batch for the worker.
struct TransferJob {
  std::function<const float*()> queries;  // [count, dim]; may wait until they are there
  std::int64_t count;
  TransferRequest request;
  TransferBuffers buffers;
  std::shared_ptr<void> owner;  // of everything that the above point to
};

// Searches, measures the rows that were found exactly, orders them (ties to the lower row), and
// gathers their channels, weights and offsets, one row a query. With k > 1 a query's rows are
// mixed by softmax(-distance / temperature) and merged: each channel that any of them has appears
// once, in the order of its first appearance from the nearest row on, with the sum of its mixed
// weights; the rows of a batch are as wide as its widest, the others repeat their first channel
// with weight 0.
//
// Results are the same bits for any number of threads. Any thread may call anything but the
// destructor at any time.
class TransferEngine {
 public:
  struct Options {
    int threads;                // of measuring and gathering, the caller's among them
    std::int64_t memory_bytes;  // held at once beyond the result; one query is always taken
    std::function<void()> on_worker_start;
  };

  TransferEngine(Table table, SearchFunction search, Options options);
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;
  ~TransferEngine();  // as close()

  const Table& table() const;

  // On the caller's thread.
  TransferResult transfer(const float* queries, std::int64_t count, const TransferRequest& request,
                          const TransferBuffers& buffers) const;

  // On the engine's worker, one job after the other in the order they came.
  std::shared_ptr<Ticket> submit(TransferJob job);

  // Ends the job under way, fails those behind it with EngineClosed, refuses others from then on.
  void close();

  // Throws UsedAfterFork in a forked process.
  void check_process() const;

  // How many queries are taken at once.
  static std::int64_t queries_at_once(std::int64_t memory_bytes, std::int64_t dim, std::int64_t k);

 private:
  struct State;  // shared with the worker, which may outlive the engine when it destroys it itself

  static void work(const std::shared_ptr<State>& state);
  void stop() noexcept;

  std::shared_ptr<State> state_;
  std::unique_ptr<std::thread> worker_;  // under the state's lock
  const pid_t process_;
};

}  // namespace gcfast
