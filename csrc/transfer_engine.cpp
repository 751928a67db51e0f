#include "transfer_engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "thread_pool.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;

constexpr int64_t kBlock = 64;             // queries that one thread takes at a time
constexpr int64_t kSerialBytes = 1 << 17;  // of rows, below which a second thread does not pay

int64_t blocks_of(int64_t queries) { return (queries + kBlock - 1) / kBlock; }

void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < -1 || ids[i] >= rows)
      throw std::invalid_argument("`index` must number the database's rows, 0 to " +
                                  std::to_string(rows - 1) + ", it returned " +
                                  std::to_string(ids[i]));
}

}  // namespace

bool Ticket::wait_for(std::chrono::milliseconds time) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, time, [this] { return has_ended_; });
}

const std::shared_ptr<TransferResult>& Ticket::result() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  return result_;
}

void Ticket::end(std::shared_ptr<TransferResult> result, std::exception_ptr error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    result_ = std::move(result);
    error_ = std::move(error);
    has_ended_ = true;
  }
  ended_.notify_all();
}

struct TransferEngine::State {
  State(Table rows, SearchFunction function, Options given)
      : table(std::move(rows)),
        search(std::move(function)),
        options(std::move(given)),
        pool(options.threads) {}

  TransferResult transfer(const float* queries, int64_t count, const TransferRequest& request,
                          const TransferBuffers& buffers);

  const Table table;
  const SearchFunction search;
  const Options options;
  ThreadPool pool;

  std::mutex mutex;  // of what follows
  std::condition_variable wake;
  std::deque<std::pair<TransferJob, std::shared_ptr<Ticket>>> queue;
  bool closed = false;
};

TransferResult TransferEngine::State::transfer(const float* queries, int64_t count,
                                               const TransferRequest& request,
                                               const TransferBuffers& buffers) {
  const int64_t k = request.k, dim = table.dim();
  TransferResult out;
  out.count = count;
  out.k = k;
  out.neighbors = room<int64_t>(count * k);
  out.distances = room<float>(count * k);
  const bool merging = request.gather && k > 1;
  if (request.gather) {
    out.labels = room<int64_t>(count * k);
    out.rows = room<int64_t>(count);
    if (buffers.offsets == nullptr) out.own_offsets = room<float>(count);
    out.offsets = buffers.offsets == nullptr ? out.own_offsets.get() : buffers.offsets;
    if (!merging) {
      out.width = table.width();
      make_room(out, buffers);
    }
  }
  const auto loop = [this](int64_t tasks, int64_t bytes, const auto& body) {
    if (bytes < kSerialBytes)
      for (int64_t i = 0; i < tasks; ++i) body(i);
    else
      pool.run(tasks, body);
  };

  const int64_t step =
      std::min(queries_at_once(options.memory_bytes, dim, k), std::max<int64_t>(count, 1));
  const auto ids = room<int64_t>(step * k);
  const auto unused = room<float>(step * k);
  int64_t widest = 1;
  std::vector<int64_t> widths;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = std::min(step, count - first);
    const Found found{queries + first * dim, ids.get(), first};
    search(n, found.queries, k, unused.get(), ids.get());
    check_ids(ids.get(), n * k, table.rows());
    const int64_t blocks = blocks_of(n);
    widths.assign(static_cast<size_t>(blocks), 1);
    loop(blocks, n * k * (4 * dim + 12 * out.width), [&](int64_t i) {
      const int64_t begin = i * kBlock, end = std::min(n, begin + kBlock);
      Gatherer(table, request, found, out).run(begin, end);
      if (merging)
        widths[static_cast<size_t>(i)] =
            Mixer(table, request, out).widest(first + begin, first + end);
    });
    for (const int64_t width : widths) widest = std::max(widest, width);
  }
  if (merging) {
    out.width = widest;
    make_room(out, buffers);
    loop(blocks_of(count), count * out.width * 12, [&](int64_t i) {
      Mixer(table, request, out).run(i * kBlock, std::min(count, (i + 1) * kBlock));
    });
  }
  return out;
}

TransferEngine::TransferEngine(Table table, SearchFunction search, Options options)
    : state_(std::make_shared<State>(std::move(table), std::move(search), std::move(options))),
      process_(getpid()) {}

TransferEngine::~TransferEngine() {
  if (getpid() == process_) {
    stop();
    return;
  }
  // Forked: the threads are not here, and a lock may be held for ever by one of them. Nothing can be
  // done with what they share but leave it.
  (void)new std::shared_ptr<State>(std::move(state_));
  (void)worker_.release();
}

const Table& TransferEngine::table() const { return state_->table; }

void TransferEngine::check_process() const {
  if (getpid() != process_)
    throw UsedAfterFork("the transfer engine belongs to process " + std::to_string(process_) +
                        " and cannot be used in process " + std::to_string(getpid()) +
                        ", forked from it: make the Explainer after the fork, or start processes "
                        "by \"spawn\"");
}

int64_t TransferEngine::queries_at_once(int64_t memory_bytes, int64_t dim, int64_t k) {
  // The query as the index may copy it, ids and distances here and in the index.
  return std::max<int64_t>(1, memory_bytes / (4 * dim + 24 * k));
}

TransferResult TransferEngine::transfer(const float* queries, int64_t count,
                                        const TransferRequest& request,
                                        const TransferBuffers& buffers) const {
  check_process();
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (state_->closed) throw EngineClosed("the transfer engine is closed");
  }
  return state_->transfer(queries, count, request, buffers);
}

std::shared_ptr<Ticket> TransferEngine::submit(TransferJob job) {
  check_process();
  auto ticket = std::make_shared<Ticket>();
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (state_->closed) throw EngineClosed("the transfer engine is closed");
    if (worker_ == nullptr)
      worker_ = std::make_unique<std::thread>([state = state_] { work(state); });
    state_->queue.emplace_back(std::move(job), ticket);
  }
  state_->wake.notify_one();
  return ticket;
}

void TransferEngine::work(const std::shared_ptr<State>& state) {
  bool started = false;
  while (true) {
    std::pair<TransferJob, std::shared_ptr<Ticket>> next;
    {
      std::unique_lock<std::mutex> lock(state->mutex);
      state->wake.wait(lock, [&] { return state->closed || !state->queue.empty(); });
      if (state->queue.empty()) return;
      next = std::move(state->queue.front());
      state->queue.pop_front();
    }
    std::shared_ptr<TransferResult> result;
    std::exception_ptr error;
    try {
      if (!started && state->options.on_worker_start) state->options.on_worker_start();
      started = true;
      const TransferJob& job = next.first;
      result = std::make_shared<TransferResult>(
          state->transfer(job.queries(), job.count, job.request, job.buffers));
    } catch (...) {
      error = std::current_exception();
    }
    // The caller may take the result and leave at once, so what the job held goes first.
    next.first = TransferJob{};
    next.second->end(std::move(result), std::move(error));
  }
}

void TransferEngine::close() {
  check_process();
  stop();
}

void TransferEngine::stop() noexcept {
  std::deque<std::pair<TransferJob, std::shared_ptr<Ticket>>> left;
  std::unique_ptr<std::thread> worker;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->closed = true;
    left.swap(state_->queue);
    worker = std::move(worker_);
  }
  state_->wake.notify_all();
  for (auto& [job, ticket] : left) {
    job = TransferJob{};
    ticket->end(nullptr, std::make_exception_ptr(EngineClosed(
                             "the transfer engine was closed before this batch was searched")));
  }
  if (worker == nullptr) return;
  // The last reference to the engine may have been in a job, and so have died on the worker.
  if (worker->get_id() == std::this_thread::get_id())
    worker->detach();
  else
    worker->join();
}

}  // namespace gcfast
