// The rows of a database as the transfer engine reads them: shards of memory-mapped arrays.
#pragma once

#include <cstdint>
#include <vector>

namespace gcfast {

// Consecutive rows. Half-precision values are IEEE binary16.
struct Shard {
  std::int64_t rows;
  const void* embeddings;        // [rows, dim]
  const std::int64_t* channels;  // [rows, width]
  const void* weights;           // [rows, width]
  const float* offsets;          // [rows]
  const std::int64_t* labels;    // [rows]
  bool half_embeddings;
  bool half_weights;
};

class Table {
 public:
  struct Row {
    const Shard* shard;
    std::int64_t row;  // within the shard
  };

  Table(std::vector<Shard> shards, std::int64_t dim, std::int64_t width);

  std::int64_t rows() const { return starts_.back(); }
  std::int64_t dim() const { return dim_; }
  std::int64_t width() const { return width_; }

  // Returns the row of this number, 0 <= id < rows().
  Row at(std::int64_t id) const;

  // Prefetches a row's embedding, and the rest of the row if `whole`.
  void prefetch(Row at, bool whole) const;
  // Prefetches a row's channels, weights and offset.
  void prefetch_weights(Row at) const;

  // Returns the squared distance of a row to a query [dim]: float32 differences, squares summed in
  // double, in an order that depends on dim alone.
  double squared_distance(Row at, const float* query) const;

  // Writes the row's weights [width] in float32.
  void copy_weights(Row at, float* out) const;

 private:
  std::size_t shard_of(std::int64_t id) const;

  std::vector<Shard> shards_;
  std::vector<std::int64_t> starts_;  // the first row of each shard, and the end of the last
  std::int64_t dim_;
  std::int64_t width_;
};

}  // namespace gcfast
