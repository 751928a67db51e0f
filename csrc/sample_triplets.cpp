#include "sample_triplets.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "clones.hpp"
#include "parallel_for.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

constexpr int64_t kLanes = 8;    // table rows side by side in registers
constexpr int64_t kAnchors = 4;  // anchors that share one load of them
constexpr int64_t kScanBlock = 64;
constexpr int64_t kMaxGroup = 32;                      // anchors that share one pass over the table
constexpr int64_t kGroupDistances = 2 * 1024 * 1024;   // doubles a thread holds for its group
constexpr int64_t kSerialWork = 1 << 20;  // coordinate differences below which threads do not pay
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// out[a][lane] = sum over d, in order, of (rows[d][lane] - anchors[d][a])^2.
GCFAST_CLONES
void block_distances(const double* rows, const double* anchors, int64_t dim, double* out) {
  double total[kAnchors][kLanes] = {};
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t a = 0; a < kAnchors; ++a) {
      const double anchor = anchors[d * kAnchors + a];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double difference = rows[d * kLanes + lane] - anchor;
        total[a][lane] += difference * difference;
      }
    }
  }
  for (int64_t a = 0; a < kAnchors; ++a)
    for (int64_t lane = 0; lane < kLanes; ++lane) out[a * kLanes + lane] = total[a][lane];
}

// How many of the next kScanBlock distances lie under the threshold.
GCFAST_CLONES
int64_t count_below(const double* distances, double threshold) {
  int64_t count = 0;
  for (int64_t i = 0; i < kScanBlock; ++i) count += distances[i] < threshold ? 1 : 0;
  return count;
}

// total[d] += factor * row[d]
GCFAST_CLONES
void add_scaled(double* total, const float* row, double factor, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) total[d] += factor * static_cast<double>(row[d]);
}

// Philox4x32-10 (Salmon et al., SC 2011), its first two words as one 64-bit number.
uint64_t philox(std::uint32_t draw, uint64_t row, uint64_t seed) {
  std::array<std::uint32_t, 4> c{draw, static_cast<std::uint32_t>(row),
                                 static_cast<std::uint32_t>(row >> 32), 0};
  auto k0 = static_cast<std::uint32_t>(seed);
  auto k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ k0,
         static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ k1,
         static_cast<std::uint32_t>(product0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (uint64_t{c[1]} << 32) | c[0];
}

// floor(x * count / 2^64), by 32-bit halves.
uint64_t scale_to(uint64_t x, uint64_t count) {
  const uint64_t mask = 0xFFFFFFFFu;
  const uint64_t middle = (x >> 32) * (count & mask) + (((x & mask) * (count & mask)) >> 32);
  const uint64_t carry = (x & mask) * (count >> 32) + (middle & mask);
  return (x >> 32) * (count >> 32) + (middle >> 32) + (carry >> 32);
}

// Squared distances of one group of anchors to the whole table: out [group, stride], each row padded
// with infinity up to `stride`.
void group_distances(const TripletAnchors& anchors, int64_t begin, int64_t end,
                     const TripletTable& table, int64_t stride, double* out) {
  const int64_t dim = table.dim;
  const int64_t quads = (end - begin + kAnchors - 1) / kAnchors;
  std::vector<double> packed(static_cast<size_t>(quads * kAnchors * dim), 0.0);  // [quad][dim][4]
  for (int64_t b = begin; b < end; ++b) {
    const int64_t quad = (b - begin) / kAnchors, a = (b - begin) % kAnchors;
    for (int64_t d = 0; d < dim; ++d)
      packed[static_cast<size_t>((quad * dim + d) * kAnchors + a)] =
          static_cast<double>(anchors.embeddings[b * dim + d]);
  }
  std::vector<double> rows(static_cast<size_t>(dim * kLanes), 0.0);  // [dim][8]
  std::array<double, kAnchors * kLanes> block{};
  for (int64_t start = 0; start < stride; start += kLanes) {
    const int64_t lanes = std::clamp<int64_t>(table.rows - start, 0, kLanes);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t d = 0; d < dim; ++d)
        rows[static_cast<size_t>(d * kLanes + lane)] =
            static_cast<double>(table.embeddings[(start + lane) * dim + d]);
    for (int64_t quad = 0; quad < quads; ++quad) {
      if (lanes > 0)
        block_distances(rows.data(), packed.data() + quad * kAnchors * dim, dim, block.data());
      for (int64_t a = 0; a < std::min(kAnchors, end - begin - quad * kAnchors); ++a)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          out[(quad * kAnchors + a) * stride + start + lane] =
              lane < lanes ? block[static_cast<size_t>(a * kLanes + lane)] : kInfinity;
    }
  }
}

// The valid pairs of one anchor, without a list of them.
class AnchorPairs {
 public:
  // `distances` is kept and overwritten: infinite wherever a row is no negative.
  AnchorPairs(const TripletTable& table, int64_t label, int64_t row, double margin,
              double* distances)
      : distances_(distances) {
    double farthest = -1, nearest = kInfinity;
    for (int64_t i = 0; i < table.rows; ++i) {
      if (table.labels[i] == label) {
        if (i != row) {
          positives_.push_back(i);
          // NaN is above nothing, as minus infinity is, and that has a place in an order.
          const double threshold = distances[i] + margin;
          thresholds_.push_back(std::isnan(threshold) ? -kInfinity : threshold);
          if (distances[i] > farthest) farthest = distances[i], hardest_[0] = i;
        }
        distances[i] = kInfinity;
      } else if (distances[i] < nearest) {
        nearest = distances[i], hardest_[1] = i;
      }
    }
    count(table.rows);
  }

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  const int64_t* hardest() const { return hardest_.data(); }

  // The pairs number ranks[i], which must be below count() and ascending.
  template <typename Take>
  void at(const std::vector<int64_t>& ranks, const Take& take) const {
    size_t positive = positives_.size();  // none yet
    int64_t block = 0, passed = 0;        // negatives valid with `positive` before `block`
    for (size_t i = 0; i < ranks.size(); ++i) {
      const auto found = static_cast<size_t>(
          std::upper_bound(ends_.begin(), ends_.end(), ranks[i]) - ends_.begin());
      if (found != positive) positive = found, block = 0, passed = 0;
      const double threshold = thresholds_[positive];
      int64_t left = ranks[i] - (positive == 0 ? 0 : ends_[positive - 1]) - passed;
      for (int64_t below; (below = count_below(distances_ + block, threshold)) <= left;
           block += kScanBlock)
        left -= below, passed += below;
      int64_t negative = block;
      while (!(distances_[negative] < threshold) || left-- > 0) ++negative;
      take(i, positives_[positive], negative);
    }
  }

  // sum_n m_n f_n - sum_p n_p f_p, added to total [dim].
  void pull(const TripletTable& table, double* total) const {
    for (int64_t n = 0; n < table.rows; ++n) {
      const auto first = first_valid(distances_[n]);
      if (first < sorted_.size())
        add_scaled(total, table.embeddings + n * table.dim,
                   static_cast<double>(sorted_.size() - first), table.dim);
    }
    for (size_t p = 0; p < positives_.size(); ++p)
      add_scaled(total, table.embeddings + positives_[p] * table.dim,
                 -static_cast<double>(ends_[p] - (p == 0 ? 0 : ends_[p - 1])), table.dim);
  }

 private:
  // The place among the ascending thresholds of the first one above the distance.
  size_t first_valid(double distance) const {
    if (sorted_.empty() || !(distance < sorted_.back())) return sorted_.size();
    if (distance < sorted_.front()) return 0;
    return static_cast<size_t>(std::upper_bound(sorted_.begin(), sorted_.end(), distance) -
                               sorted_.begin());
  }

  // ends_[p]: valid pairs of the positives up to and including p.
  void count(int64_t rows) {
    std::vector<size_t> order(positives_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(),
              [this](size_t a, size_t b) { return thresholds_[a] < thresholds_[b]; });
    for (const size_t p : order) sorted_.push_back(thresholds_[p]);
    std::vector<int64_t> first_at(positives_.size() + 1, 0);
    for (int64_t n = 0; n < rows; ++n) ++first_at[first_valid(distances_[n])];
    ends_.resize(positives_.size());
    int64_t valid = 0;
    for (size_t s = 0; s < order.size(); ++s) ends_[order[s]] = valid += first_at[s];
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
  }

  double* distances_;
  std::vector<int64_t> positives_;  // ascending
  std::vector<double> thresholds_;  // of the positives: D(a, p) + margin
  std::vector<double> sorted_;      // the same, ascending
  std::vector<int64_t> ends_;
  std::array<int64_t, 2> hardest_{-1, -1};
};

// Calls body(b, pairs) for every anchor b, groups of anchors in parallel.
template <typename Body>
void for_each_anchor(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     int threads, const Body& body) {
  if (std::isnan(margin)) throw std::invalid_argument("`margin` must be a number, got NaN");
  const int64_t stride = (table.rows + kScanBlock - 1) / kScanBlock * kScanBlock;
  const int64_t fitting = kGroupDistances / std::max<int64_t>(stride, 1) / kAnchors * kAnchors;
  const int64_t group = std::clamp(fitting, kAnchors, kMaxGroup);
  const bool serial = anchors.count * table.rows * table.dim < kSerialWork;
  parallel_for((anchors.count + group - 1) / group, serial ? 1 : threads, [&](int64_t g) {
    const int64_t begin = g * group, end = std::min(anchors.count, begin + group);
    std::vector<double> distances(static_cast<size_t>((end - begin) * stride));
    group_distances(anchors, begin, end, table, stride, distances.data());
    for (int64_t b = begin; b < end; ++b) {
      body(b, AnchorPairs(table, anchors.labels[b], anchors.rows[b], margin,
                          distances.data() + (b - begin) * stride));
    }
  });
}

}  // namespace

void sample_triplets(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     const TripletDraw& draw, int threads, int64_t* positives, int64_t* negatives,
                     int64_t* counts, int64_t* hardest) {
  const int64_t T = draw.triplets;
  for_each_anchor(anchors, table, margin, threads, [&](int64_t b, const AnchorPairs& pairs) {
    const int64_t V = pairs.count();
    counts[b] = V;
    std::copy_n(pairs.hardest(), 2, hardest + 2 * b);
    std::fill_n(positives + b * T, T, int64_t{-1});
    std::fill_n(negatives + b * T, T, int64_t{-1});

    const int64_t first = std::max<int64_t>(draw.first, 0);
    const bool listed = draw.first >= 0 || V <= T;
    std::vector<int64_t> ranks(static_cast<size_t>(
        listed ? std::clamp<int64_t>(V - first, 0, T) : T));
    std::vector<size_t> places(ranks.size());
    std::iota(places.begin(), places.end(), size_t{0});
    if (listed) {
      std::iota(ranks.begin(), ranks.end(), first);
    } else {
      std::vector<int64_t> drawn(ranks.size());
      for (size_t t = 0; t < drawn.size(); ++t)
        drawn[t] = static_cast<int64_t>(
            scale_to(philox(static_cast<std::uint32_t>(t), static_cast<uint64_t>(anchors.rows[b]),
                            draw.seed),
                     static_cast<uint64_t>(V)));
      std::sort(places.begin(), places.end(),
                [&](size_t x, size_t y) { return drawn[x] < drawn[y]; });
      for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = drawn[places[i]];
    }
    pairs.at(ranks, [&](size_t i, int64_t positive, int64_t negative) {
      const int64_t place = b * T + static_cast<int64_t>(places[i]);
      positives[place] = positive;
      negatives[place] = negative;
    });
  });
}

void mean_cotangents(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     int threads, float* cotangents, int64_t* counts, int64_t* hardest) {
  for_each_anchor(anchors, table, margin, threads, [&](int64_t b, const AnchorPairs& pairs) {
    counts[b] = pairs.count();
    std::copy_n(pairs.hardest(), 2, hardest + 2 * b);
    std::vector<double> total(static_cast<size_t>(table.dim), 0.0);
    if (counts[b] > 0) pairs.pull(table, total.data());
    const double scale = counts[b] > 0 ? 2.0 / static_cast<double>(counts[b]) : 0.0;
    for (int64_t d = 0; d < table.dim; ++d)
      cotangents[b * table.dim + d] = static_cast<float>(scale * total[static_cast<size_t>(d)]);
  });
}

}  // namespace gcfast
