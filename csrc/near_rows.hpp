// The negatives of some anchors that are under a threshold of theirs, found by matrix products.
// What the products' error leaves open is measured again while the row is at hand.
#pragma once

#include <cstdint>
#include <vector>

#include "sample_triplets.hpp"

namespace gcfast {

// The thresholds D(a, p) + margin of an anchor's positives, in ascending order, and where a
// distance comes among them.
class Ladder {
 public:
  Ladder() = default;
  // NaN is above nothing, as minus infinity is.
  explicit Ladder(const std::vector<double>& thresholds);

  std::int64_t steps() const { return static_cast<std::int64_t>(sorted_.size()); }
  double top() const;  // minus infinity where there is none
  // The first step above the distance; steps() where there is none, and for NaN.
  std::int64_t above(double distance) const;
  double at(std::int64_t step) const { return sorted_[static_cast<std::size_t>(step)]; }
  // The step of each threshold as they were given.
  const std::vector<std::int64_t>& step_of() const { return step_of_; }

 private:
  std::vector<double> sorted_;
  std::vector<std::int64_t> step_of_;
  std::vector<std::int32_t> first_;  // per slice of the range: about where to look
  double scale_ = 0;                 // slices a unit of distance
};

struct NearAnchor {
  const float* embedding;
  std::int64_t label;
  Ladder ladder;
};

// Some of the negatives under the ladder's top, ascending, and the first step above each.
struct NearRows {
  std::vector<std::uint32_t> rows;
  std::vector<std::int32_t> steps;
};

// What was found for one anchor.
struct Near {
  std::vector<NearRows> parts;  // one after another all the negatives under the ladder's top
  std::int64_t nearest = -1;    // of all the negatives; ties to the lower row
  // sum_n m_n f_n over them, m_n the steps above n, where it is asked for; else empty.
  std::vector<double> pull;
};

constexpr std::int64_t kNearAnchors = 64;  // that may be looked for together

// For each anchor, at most kNearAnchors. The same for any number of threads. Empty where
// `most_found` rows would not hold what there is, unless there is but one anchor.
std::vector<Near> near_rows(const std::vector<NearAnchor>& anchors, const TripletTable& table,
                            bool pull, std::int64_t most_found, int threads);

}  // namespace gcfast
