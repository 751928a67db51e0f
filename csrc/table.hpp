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

  // The row of this number, 0 <= id < rows().
  Row at(std::int64_t id) const;

  // Asks the processor to fetch a row's embedding, and all of it if `whole`.
  void prefetch(Row at, bool whole) const;
  // Its channels, weights and offset.
  void prefetch_weights(Row at) const;

  // The squared distance of a row to a query [dim]: differences in float32, their squares summed in
  // double, in an order that depends on dim alone.
  double squared_distance(Row at, const float* query) const;

  // The row's weights [width] in float32.
  void copy_weights(Row at, float* out) const;

 private:
  std::size_t shard_of(std::int64_t id) const;

  std::vector<Shard> shards_;
  std::vector<std::int64_t> starts_;  // the first row of each shard, and the end of the last
  std::int64_t dim_;
  std::int64_t width_;
};

}  // namespace gcfast
