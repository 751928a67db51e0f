#include "table.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "clones.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;

constexpr int64_t kLanes = 8;           // partial sums of a distance
constexpr int64_t kCacheLine = 64;      // bytes
constexpr int64_t kPrefetchLines = 16;  // of one array; hardware prefetches the rest of longer ones

float from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7FFFu;
  if (magnitude < 0x0400u) {  // zero and subnormal numbers, in units of 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -value : value;
  }
  // Exponents are rebiased by 127 - 15; infinity and NaN keep theirs all ones.
  const std::uint32_t bits =
      sign | ((magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u));
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GCFAST_CLONES
double sum_of_squares(const float* row, const float* query, int64_t dim) {
  double total[kLanes] = {};
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double difference = static_cast<double>(row[d + lane] - query[d + lane]);
      total[lane] += difference * difference;
    }
  for (int64_t d = whole; d < dim; ++d) {
    const double difference = static_cast<double>(row[d] - query[d]);
    total[d - whole] += difference * difference;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
  return sum;
}

void prefetch_array(const void* begin, int64_t bytes) {
#if defined(__GNUC__)
  const char* const first = static_cast<const char*>(begin);
  const int64_t end = std::min(bytes, kPrefetchLines * kCacheLine);
  for (int64_t at = 0; at < end; at += kCacheLine) __builtin_prefetch(first + at);
  __builtin_prefetch(first + end - 1);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace

Table::Table(std::vector<Shard> shards, int64_t dim, int64_t width)
    : shards_(std::move(shards)), starts_{0}, dim_(dim), width_(width) {
  for (const Shard& shard : shards_) starts_.push_back(starts_.back() + shard.rows);
}

size_t Table::shard_of(int64_t id) const {
  return static_cast<size_t>(std::upper_bound(starts_.begin() + 1, starts_.end(), id) -
                             starts_.begin() - 1);
}

Table::Row Table::at(int64_t id) const {
  const size_t shard = shards_.size() == 1 ? 0 : shard_of(id);
  return {&shards_[shard], id - starts_[shard]};
}

void Table::prefetch(Row at, bool whole) const {
  const Shard& shard = *at.shard;
  const int64_t embedding = dim_ * (shard.half_embeddings ? 2 : 4);
  prefetch_array(static_cast<const char*>(shard.embeddings) + at.row * embedding, embedding);
  if (!whole) return;
  prefetch_weights(at);
  prefetch_array(shard.labels + at.row, 8);
}

void Table::prefetch_weights(Row at) const {
  const Shard& shard = *at.shard;
  const int64_t weights = width_ * (shard.half_weights ? 2 : 4);
  prefetch_array(shard.channels + at.row * width_, width_ * 8);
  prefetch_array(static_cast<const char*>(shard.weights) + at.row * weights, weights);
  prefetch_array(shard.offsets + at.row, 4);
}

double Table::squared_distance(Row at, const float* query) const {
  const Shard& shard = *at.shard;
  if (!shard.half_embeddings)
    return sum_of_squares(static_cast<const float*>(shard.embeddings) + at.row * dim_, query, dim_);
  const auto* const half = static_cast<const std::uint16_t*>(shard.embeddings) + at.row * dim_;
  thread_local std::vector<float> row;
  row.resize(static_cast<size_t>(dim_));
  std::transform(half, half + dim_, row.begin(), from_half);
  return sum_of_squares(row.data(), query, dim_);
}

void Table::copy_weights(Row at, float* out) const {
  const Shard& shard = *at.shard;
  if (shard.half_weights) {
    const auto* const half = static_cast<const std::uint16_t*>(shard.weights) + at.row * width_;
    std::transform(half, half + width_, out, from_half);
  } else {
    std::memcpy(out, static_cast<const float*>(shard.weights) + at.row * width_,
                static_cast<size_t>(width_) * sizeof(float));
  }
}

}  // namespace gcfast
