#include "tries.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "distances.hpp"
#include "philox.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

constexpr int64_t kRound = 256;          // TRY_ROUND of the reference
constexpr int64_t kAhead = 16;           // tries whose rows are on their way from memory
constexpr int64_t kMostKnown = 1 << 16;  // positives whose distances are kept

void fetch(const float* row, int64_t dim) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 16;  // floats
  const int64_t end = std::min<int64_t>(dim, 32 * kLine);
  for (int64_t d = 0; d < end; d += kLine) __builtin_prefetch(row + d, 0, 2);
  __builtin_prefetch(row + end - 1, 0, 2);  // a row need not start where a line does
#endif
}

class Tries {
 public:
  Tries(const float* anchor, const TripletTable& table, const AnchorPartners& partners,
        double margin)
      : anchor_(anchor), table_(table), partners_(partners), margin_(margin) {
    if (partners.positives() <= kMostKnown)
      known_.assign(static_cast<size_t>(partners.positives()), kUnknown);
  }

  // Places of one round's pairs, and then their rows.
  void prepare(int64_t first, uint64_t anchor_row, uint64_t seed) {
    const auto P = static_cast<uint64_t>(partners_.positives());
    const auto Q = static_cast<uint64_t>(partners_.negatives());
    for (size_t j = 0; j < kRound; ++j) {
      const RandomWords words =
          philox(static_cast<std::uint32_t>(first) + static_cast<std::uint32_t>(j), anchor_row,
                 kStreamTries, seed);
      ranks_[j] = static_cast<int64_t>(scale_to(words.first, P));
      positives_[j] = partners_.positive_place(ranks_[j]);
      negatives_[j] = partners_.negative_place(static_cast<int64_t>(scale_to(words.second, Q)));
#if defined(__GNUC__)
      __builtin_prefetch(table_.by_label + positives_[j]);
      __builtin_prefetch(table_.by_label + negatives_[j]);
#endif
    }
    for (size_t j = 0; j < kRound; ++j) {
      positives_[j] = row_at(table_, positives_[j]);
      negatives_[j] = row_at(table_, negatives_[j]);
    }
  }

  void run(std::vector<std::pair<int64_t, int64_t>>& kept, int64_t first, int64_t needed,
           int64_t& needed_at) {
    for (size_t j = 0; j < std::min<size_t>(kAhead, kRound); ++j) fetch_pair(j);
    for (size_t j = 0; j < kRound; ++j) {
      if (j + kAhead < kRound) fetch_pair(j + kAhead);
      if (!is_valid(j)) continue;
      kept.emplace_back(positives_[j], negatives_[j]);
      if (static_cast<int64_t>(kept.size()) == needed)
        needed_at = first + static_cast<int64_t>(j) + 1;
    }
  }

 private:
  static constexpr float kUnknown = -1;

  const float* row(int64_t number) const { return table_.embeddings + number * table_.dim; }

  void fetch_pair(size_t j) const {
    if (known_.empty() || known_[static_cast<size_t>(ranks_[j])] == kUnknown)
      fetch(row(positives_[j]), table_.dim);
    fetch(row(negatives_[j]), table_.dim);
  }

  bool is_valid(size_t j) {
    const float* const positive = row(positives_[j]);
    const float* const negative = row(negatives_[j]);
    float far;
    if (known_.empty()) {
      far = quick_distance(anchor_, positive, table_.dim);
    } else {
      float& known = known_[static_cast<size_t>(ranks_[j])];
      if (known == kUnknown) known = quick_distance(anchor_, positive, table_.dim);
      far = known;
    }
    const float near = quick_distance(anchor_, negative, table_.dim);
    if (far < kLargest && near < kLargest) {
      const double gap = static_cast<double>(far) - static_cast<double>(near) + margin_;
      const double slack = (static_cast<double>(far) + static_cast<double>(near)) *
                               relative_error(table_.dim, kUnit) +
                           kTiny;
      if (gap > slack) return true;
      if (gap < -slack) return false;
    }
    return exact_distance(positive, anchor_, table_.dim) + margin_ >
           exact_distance(negative, anchor_, table_.dim);
  }

  const float* anchor_;
  const TripletTable& table_;
  const AnchorPartners& partners_;
  double margin_;
  std::vector<float> known_;  // distances of the positives, as they come up
  std::array<int64_t, kRound> ranks_{}, positives_{}, negatives_{};
};

// How many different pairs are among the first `most`.
int64_t different(std::vector<std::pair<int64_t, int64_t>> kept, int64_t most) {
  if (static_cast<int64_t>(kept.size()) > most) kept.resize(static_cast<size_t>(most));
  std::sort(kept.begin(), kept.end());
  return std::unique(kept.begin(), kept.end()) - kept.begin();
}

}  // namespace

Tried try_pairs(const float* anchor, int64_t anchor_row, const TripletTable& table,
                const AnchorPartners& partners, double margin, const TripletDraw& draw) {
  const int64_t T = draw.triplets, most = 2 * (T + 1);
  Tried tried{{}, false, 0};
  if (partners.positives() == 0 || partners.negatives() == 0 || draw.tries < kRound) return tried;
  Tries tries(anchor, table, partners, margin);
  int64_t done = 0, needed_at = 0;
  const auto kept = [&] { return static_cast<int64_t>(tried.kept.size()); };
  while (done + kRound <= draw.tries && 64 * done < draw.tries * (4 + kept()) && kept() < most &&
         !tried.enough) {
    tries.prepare(done, static_cast<uint64_t>(anchor_row), draw.seed);
    tries.run(tried.kept, done, T + 1, needed_at);
    done += kRound;
    tried.enough = kept() > T && different(tried.kept, most) > T;
  }
  if (tried.enough) {
    const double every =
        static_cast<double>(partners.positives()) * static_cast<double>(partners.negatives());
    tried.count = static_cast<int64_t>(
        std::nearbyint(every / static_cast<double>(needed_at - 1) * static_cast<double>(T)));
  }
  return tried;
}

}  // namespace gcfast
