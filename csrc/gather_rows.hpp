// From the ids that an index returned to rows for ops.sparse_cam: measures, orders, gathers and
// merges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "merge_rows.hpp"
#include "table.hpp"

namespace gcfast {

struct TransferRequest {
  std::int64_t k;
  double temperature;  // of the mixing of k > 1 rows
  bool gather;         // otherwise neighbors and distances only
};

// Where the gathered rows go; if null, the result allocates them.
struct TransferBuffers {
  std::int64_t* channels = nullptr;  // [count * k * width] or more
  float* weights = nullptr;          // the same
  float* offsets = nullptr;          // [count] or more
};

struct TransferResult {
  std::int64_t count = 0;
  std::int64_t k = 0;
  std::int64_t width = 0;                     // of the gathered rows
  std::unique_ptr<std::int64_t[]> neighbors;  // [count, k] row numbers, nearest first; -1: none
  std::unique_ptr<float[]> distances;         // [count, k] squared L2; infinite where none
  std::unique_ptr<std::int64_t[]> labels;     // [count, k]; -1 where there is none
  std::unique_ptr<std::int64_t[]> rows;       // [count]: the query's gathered row, its own number;
                                              // -1 where it has no neighbor
  std::int64_t* channels = nullptr;           // [count, width]
  float* weights = nullptr;                   // [count, width]
  float* offsets = nullptr;                   // [count]
  std::unique_ptr<std::int64_t[]> own_channels;  // where the three point without buffers
  std::unique_ptr<float[]> own_weights, own_offsets;
};

// Points the result's channels and weights, [count, width], to the buffers, or allocates them.
void make_room(TransferResult& out, const TransferBuffers& buffers);

// As std::make_unique, but not initialised.
template <typename T>
std::unique_ptr<T[]> room(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

// Consecutive queries of a batch and what the index found for them.
struct Found {
  const float* queries;     // [count, dim]
  const std::int64_t* ids;  // [count, k]
  std::int64_t first;       // the first one's number in the batch
};

// One thread's part of the work.
class Gatherer {
 public:
  Gatherer(const Table& table, const TransferRequest& request, const Found& found,
           TransferResult& out)
      : table_(table), request_(request), found_(found), out_(out) {}

  // Measures and orders what was found for the queries [begin, end); gathers the rows if k is 1.
  void run(std::int64_t begin, std::int64_t end);

 private:
  void prefetch(std::int64_t query) const;
  void order(std::int64_t query);
  void label(std::int64_t query);
  void copy(std::int64_t query);

  const Table& table_;
  const TransferRequest& request_;
  const Found& found_;
  TransferResult& out_;
  std::vector<std::pair<float, std::int64_t>> near_;
};

// One thread's part of the mixing of k > 1 rows, whose neighbors are in the result. The width of
// the rows is known only once all are merged, and to keep them until then would take as much memory
// again as the result: so they are counted first and mixed afterwards.
class Mixer {
 public:
  Mixer(const Table& table, const TransferRequest& request, TransferResult& out);

  // Returns the largest number of channels that the neighbors of one of the queries [begin, end)
  // have.
  std::int64_t widest(std::int64_t begin, std::int64_t end);
  // Writes their mixed rows, out.width each.
  void run(std::int64_t begin, std::int64_t end);

 private:
  void prefetch(std::int64_t query) const;
  void mix(std::int64_t query);

  const Table& table_;
  const TransferRequest& request_;
  TransferResult& out_;
  RowMerger merger_;
  std::vector<double> shares_;
  std::vector<float> weights_;
};

}  // namespace gcfast
