// From the ids that an index gave to rows as ops.sparse_cam takes them: measured, ordered,
// gathered and merged.
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
  bool gather;         // otherwise only neighbours and distances are wanted
};

// Where the gathered rows go; nulls: the result makes room itself.
struct TransferBuffers {
  std::int64_t* channels = nullptr;  // [count * k * width] or more
  float* weights = nullptr;          // the same
  float* offsets = nullptr;          // [count] or more
};

struct TransferResult {
  std::int64_t count = 0;
  std::int64_t k = 0;
  std::int64_t width = 0;                      // of the gathered rows
  std::unique_ptr<std::int64_t[]> neighbors;   // [count, k] row numbers, nearest first; -1: none
  std::unique_ptr<float[]> distances;          // [count, k] squared L2; infinite where none
  std::unique_ptr<std::int64_t[]> labels;      // [count, k]; -1 where there is none
  std::unique_ptr<std::int64_t[]> rows;        // [count]: the query's gathered row, its own number;
                                               // -1 where it has no neighbour
  std::int64_t* channels = nullptr;            // [count, width]
  float* weights = nullptr;                    // [count, width]
  float* offsets = nullptr;                    // [count]
  std::unique_ptr<std::int64_t[]> own_channels;  // what the three point into without buffers
  std::unique_ptr<float[]> own_weights, own_offsets;
};

// Points the result's channels and weights, [count, width], into the buffers or into room of its
// own.
void make_room(TransferResult& out, const TransferBuffers& buffers);

// As std::make_unique, but not filled.
template <typename T>
std::unique_ptr<T[]> room(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

// Some queries of a batch and what the index found for them.
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

  // The queries [begin, end) of those found: measured and ordered, and where one row is gathered for
  // each, that too.
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

// One thread's part of the mixing of k > 1 rows, whose neighbours are in the result. How wide the
// rows are is not known before all have been looked at, and to keep them until then would take as much
// memory again as the result: so they are counted first and mixed then.
class Mixer {
 public:
  Mixer(const Table& table, const TransferRequest& request, TransferResult& out);

  // How many channels the neighbours of the widest of the queries [begin, end) have.
  std::int64_t widest(std::int64_t begin, std::int64_t end);
  // Their mixed rows, out.width each.
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
