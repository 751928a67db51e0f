// The CPU backend of sample_triplets and mean_cotangents: what gcfast/reference/triplets.py
// specifies, draw for draw, for any number of threads.
#pragma once

#include <cstdint>

namespace gcfast {

struct TripletTable {
  const float* embeddings;       // [rows, dim]
  const std::int64_t* labels;    // [rows]
  const std::int64_t* by_label;  // [rows]: row numbers in the order of (label, row)
  std::int64_t rows;
  std::int64_t dim;
  // nullptr, or [rows, dim + 8]: what tries look at first, at each place of the order the row there
  // as dim signed bytes, the float that these are multiples of, and a float that the distance
  // between the row and the multiples does not exceed.
  const std::uint8_t* sketch = nullptr;

  const float* row(std::int64_t number) const { return embeddings + number * dim; }
};

constexpr std::int64_t sketch_bytes(std::int64_t dim) { return dim + 8; }

struct TripletAnchors {
  const float* embeddings;     // [count, dim]
  const std::int64_t* labels;  // [count]
  const std::int64_t* rows;    // [count]: the anchor's own row, never its own positive
  std::int64_t count;
};

// How the pairs of an anchor are chosen from its valid ones, which are ordered by (positive,
// negative).
struct TripletDraw {
  std::int64_t triplets;  // T
  std::uint64_t seed;
  std::int64_t first;  // -1: T uniform draws; otherwise the pairs first … first + T - 1
  std::int64_t tries;  // before the table is scanned; not used where pairs are listed
};

struct TripletOutputs {
  std::int64_t* positives;  // [count, T], -1 where there is no pair
  std::int64_t* negatives;
  std::int64_t* counts;   // [count]
  std::int64_t* hardest;  // [count, 2]: farthest positive, nearest negative, -1 where none is
  bool* exact;            // [count]: scanned; otherwise the count is estimated, hardest -1
};

void sample_triplets(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     const TripletDraw& draw, int threads, const TripletOutputs& out);

// Outputs: cotangents [count, dim], counts [count], hardest [count, 2].
void mean_cotangents(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     int threads, float* cotangents, std::int64_t* counts, std::int64_t* hardest);

}  // namespace gcfast
