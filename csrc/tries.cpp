#include "tries.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "clones.hpp"
#include "distances.hpp"
#include "philox.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;
using std::uint32_t;
using std::uint64_t;

constexpr int64_t kRound = 256;          // TRY_ROUND of the reference
constexpr size_t kAhead = 16;            // tries whose rows are on their way from memory
constexpr int64_t kMostKnown = 1 << 16;  // positives whose distances are kept
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

using Numbers = std::array<int64_t, kRound>;

// The two 64-bit words of each try of a round, scaled to the numbers of positives and negatives.
GCFAST_CLONES
void draw_round(uint32_t first, uint64_t row, uint64_t seed, uint64_t positives, uint64_t negatives,
                int64_t* positive, int64_t* negative) {
  for (uint32_t j = 0; j < kRound; ++j) {
    const RandomWords words = philox(first + j, row, kStreamTries, seed);
    positive[j] = static_cast<int64_t>(scale_to(words.first, positives));
    negative[j] = static_cast<int64_t>(scale_to(words.second, negatives));
  }
}

// Inlined, for GCC leaves out calls of a function that does nothing but this.
#if defined(__GNUC__)
__attribute__((always_inline))
#endif
inline void fetch(const void* memory, int64_t bytes) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64, kMost = 32 * kLine;
  const char* const start = static_cast<const char*>(memory);
  const int64_t end = std::min(bytes, kMost);
  for (int64_t at = 0; at < end; at += kLine) __builtin_prefetch(start + at, 0, 2);
  __builtin_prefetch(start + end - 1, 0, 2);  // it need not start where a line does
#endif
}

// What a squared distance lies between; NaN where nothing is known.
struct Bounds {
  double low, high;
};

// Distances from the rows themselves, in float32.
class FullRows {
 public:
  FullRows(const float* anchor, const TripletTable& table, const AnchorPartners& partners)
      : anchor_(anchor), table_(table), error_(relative_error(table.dim, kUnit)) {
    if (partners.positives() <= kMostKnown)
      known_.assign(static_cast<size_t>(partners.positives()), kUnknown);
  }

  // From places of the order to rows.
  void prepare(Numbers& positives, Numbers& negatives) const {
#if defined(__GNUC__)
    for (size_t j = 0; j < kRound; ++j) {
      __builtin_prefetch(table_.by_label + positives[j]);
      __builtin_prefetch(table_.by_label + negatives[j]);
    }
#endif
    for (size_t j = 0; j < kRound; ++j) {
      positives[j] = row_at(table_, positives[j]);
      negatives[j] = row_at(table_, negatives[j]);
    }
  }
  int64_t row_of(int64_t number) const { return number; }

  void fetch_positive(int64_t rank, int64_t row) const {
    if (known_.empty() || known_[static_cast<size_t>(rank)] == kUnknown) fetch_negative(row);
  }
  void fetch_negative(int64_t row) const {
    fetch(table_.row(row), table_.dim * static_cast<int64_t>(sizeof(float)));
  }

  Bounds positive(int64_t rank, int64_t row) {
    if (known_.empty()) return negative(row);
    float& known = known_[static_cast<size_t>(rank)];
    if (known == kUnknown) known = quick_distance(anchor_, table_.row(row), table_.dim);
    return bounds(known);
  }
  Bounds negative(int64_t row) const {
    return bounds(quick_distance(anchor_, table_.row(row), table_.dim));
  }

 private:
  static constexpr float kUnknown = -1;

  Bounds bounds(float quick) const {
    if (!(quick < kLargest)) return {kNaN, kNaN};
    const auto distance = static_cast<double>(quick);
    return {distance * (1 - error_) - kTiny, distance * (1 + error_) + kTiny};
  }

  const float* anchor_;
  const TripletTable& table_;
  double error_;
  std::vector<float> known_;  // distances of the positives, as they come up
};

// Distances from the sketch: a quarter of the bytes, and no look at which row stands at a place.
class SketchedRows {
 public:
  SketchedRows(const float* anchor, const TripletTable& table, const AnchorPartners&)
      : anchor_(anchor),
        table_(table),
        bytes_(sketch_bytes(table.dim)),
        error_(relative_error(table.dim, kUnit)) {}

  void prepare(Numbers&, Numbers&) const {}
  int64_t row_of(int64_t place) const { return row_at(table_, place); }
  void fetch_positive(int64_t, int64_t place) const { fetch_negative(place); }
  void fetch_negative(int64_t place) const { fetch(table_.sketch + place * bytes_, bytes_); }
  Bounds positive(int64_t, int64_t place) const { return negative(place); }

  Bounds negative(int64_t place) const {
    const std::uint8_t* const codes = table_.sketch + place * bytes_;
    float scale, radius;
    std::memcpy(&scale, codes + table_.dim, sizeof scale);
    std::memcpy(&radius, codes + table_.dim + sizeof scale, sizeof radius);
    const float quick = quick_sketched_distance(anchor_, codes, scale, table_.dim);
    if (!(quick < kLargest && radius < kLargest)) return {kNaN, kNaN};
    // The triangle inequality: the row is within the radius of what the codes say.
    const double root = std::sqrt(static_cast<double>(quick));
    const double low = std::max(root * (1 - error_) - static_cast<double>(radius), 0.0);
    const double high = root * (1 + error_) + static_cast<double>(radius);
    return {low * low - kTiny, high * high + kTiny};
  }

 private:
  const float* anchor_;
  const TripletTable& table_;
  int64_t bytes_;
  double error_;
};

// How many different pairs are among the first `most`.
int64_t different(std::vector<std::pair<int64_t, int64_t>> kept, int64_t most) {
  if (static_cast<int64_t>(kept.size()) > most) kept.resize(static_cast<size_t>(most));
  std::sort(kept.begin(), kept.end());
  return std::unique(kept.begin(), kept.end()) - kept.begin();
}

template <typename Rows>
Tried try_pairs_by(const float* anchor, int64_t anchor_row, const TripletTable& table,
                   const AnchorPartners& partners, double margin, const TripletDraw& draw) {
  const int64_t T = draw.triplets, most = 2 * (T + 1);
  const int64_t P = partners.positives(), Q = partners.negatives();
  Tried tried{{}, false, 0};
  if (P == 0 || Q == 0 || draw.tries < kRound) return tried;
  Rows rows(anchor, table, partners);
  Numbers ranks, positives, negatives;
  const auto is_valid = [&](size_t j) {
    const Bounds far = rows.positive(ranks[j], positives[j]), near = rows.negative(negatives[j]);
    if (far.low + margin > near.high) return true;
    if (far.high + margin < near.low) return false;
    return exact_distance(table.row(rows.row_of(positives[j])), anchor, table.dim) + margin >
           exact_distance(table.row(rows.row_of(negatives[j])), anchor, table.dim);
  };
  const auto fetch_pair = [&](size_t j) {
    if (j >= kRound) return;
    rows.fetch_positive(ranks[j], positives[j]);
    rows.fetch_negative(negatives[j]);
  };
  int64_t done = 0, needed_at = 0;
  const auto kept = [&] { return static_cast<int64_t>(tried.kept.size()); };
  while (done + kRound <= draw.tries && 64 * done < draw.tries * (4 + kept()) && kept() < most &&
         !tried.enough) {
    draw_round(static_cast<uint32_t>(done), static_cast<uint64_t>(anchor_row), draw.seed,
               static_cast<uint64_t>(P), static_cast<uint64_t>(Q), ranks.data(), negatives.data());
    for (size_t j = 0; j < kRound; ++j) {
      positives[j] = partners.positive_place(ranks[j]);
      negatives[j] = partners.negative_place(negatives[j]);
    }
    rows.prepare(positives, negatives);
    for (size_t j = 0; j < kAhead; ++j) fetch_pair(j);
    for (size_t j = 0; j < kRound; ++j) {
      fetch_pair(j + kAhead);
      if (!is_valid(j)) continue;
      tried.kept.emplace_back(rows.row_of(positives[j]), rows.row_of(negatives[j]));
      if (kept() == T + 1) needed_at = done + static_cast<int64_t>(j) + 1;
    }
    done += kRound;
    tried.enough = kept() > T && different(tried.kept, most) > T;
  }
  if (tried.enough) {
    const double every = static_cast<double>(P) * static_cast<double>(Q);
    tried.count = static_cast<int64_t>(
        std::nearbyint(every / static_cast<double>(needed_at - 1) * static_cast<double>(T)));
  }
  return tried;
}

}  // namespace

Tried try_pairs(const float* anchor, int64_t anchor_row, const TripletTable& table,
                const AnchorPartners& partners, double margin, const TripletDraw& draw) {
  const auto run = table.sketch == nullptr ? try_pairs_by<FullRows> : try_pairs_by<SketchedRows>;
  return run(anchor, anchor_row, table, partners, margin, draw);
}

}  // namespace gcfast
