#include "sample_triplets.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "clones.hpp"
#include "distances.hpp"
#include "near_rows.hpp"
#include "parallel_for.hpp"
#include "philox.hpp"
#include "tries.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;
using std::uint64_t;

constexpr int64_t kCountBlock = 1024;
constexpr int64_t kMostFound = 1 << 24;  // rows held for a group of anchors: 200 MB
// Coordinate differences below which threads do not pay.
constexpr int64_t kSerialWork = 1 << 20;

// How many of the rows are under a step of their ladder.
GCFAST_CLONES
int64_t count_under(const std::int32_t* steps, int64_t count, std::int32_t step) {
  std::int32_t under = 0;
  for (int64_t i = 0; i < count; ++i) under += steps[i] <= step ? 1 : 0;
  return under;
}

// The positives of an anchor that is scanned.
struct Positives {
  std::vector<int64_t> rows;  // ascending
  int64_t farthest = -1;
};

// The valid pairs of one anchor, without a list of them.
class AnchorPairs {
 public:
  AnchorPairs(const Positives& positives, const Ladder& ladder, const Near& near)
      : positives_(positives), ladder_(ladder), near_(near) {
    std::vector<int64_t> at_step(static_cast<size_t>(ladder.steps()) + 1, 0);
    for (const auto& part : near.parts)
      for (const auto step : part.steps) ++at_step[static_cast<size_t>(step)];
    std::partial_sum(at_step.begin(), at_step.end(), at_step.begin());
    for (const int64_t step : ladder.step_of()) ends_.push_back(at_step[static_cast<size_t>(step)]);
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
  }

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  std::array<int64_t, 2> hardest() const { return {positives_.farthest, near_.nearest}; }
  // Negatives that are valid with a positive.
  int64_t count_of(size_t p) const { return ends_[p] - (p == 0 ? 0 : ends_[p - 1]); }

  // The pairs number ranks[i], which must be below count() and ascending.
  template <typename Take>
  void at(const std::vector<int64_t>& ranks, const Take& take) const {
    // Draws of one positive share the counting; blocks come first, so that one is read once.
    struct Run {
      size_t begin, end, positive;
      int64_t passed;  // negatives valid with the positive before the block
    };
    std::vector<Run> runs;
    for (size_t i = 0; i < ranks.size();) {
      const auto positive = static_cast<size_t>(
          std::upper_bound(ends_.begin(), ends_.end(), ranks[i]) - ends_.begin());
      size_t end = i;
      while (end < ranks.size() && ranks[end] < ends_[positive]) ++end;
      runs.push_back({i, end, positive, 0});
      i = end;
    }
    for (const auto& part : near_.parts) {
      const auto found = static_cast<int64_t>(part.rows.size());
      for (int64_t block = 0; block < found && !runs.empty(); block += kCountBlock) {
        const int64_t size = std::min(kCountBlock, found - block);
        const std::int32_t* const steps = part.steps.data() + block;
        for (auto& run : runs) {
          const auto step = static_cast<std::int32_t>(ladder_.step_of()[run.positive]);
          const int64_t before = run.positive == 0 ? 0 : ends_[run.positive - 1];
          const int64_t reached = run.passed + count_under(steps, size, step);
          int64_t next = 0, passed = run.passed;  // of the block; negatives before `next`
          for (; run.begin < run.end && ranks[run.begin] - before < reached; ++run.begin) {
            for (; passed <= ranks[run.begin] - before; ++next)
              passed += steps[next] <= step ? 1 : 0;
            take(run.begin, positives_.rows[run.positive],
                 part.rows[static_cast<size_t>(block + next - 1)]);
          }
          run.passed = reached;
        }
        runs.erase(std::remove_if(runs.begin(), runs.end(),
                                  [](const Run& run) { return run.begin == run.end; }),
                   runs.end());
      }
    }
  }

 private:
  const Positives& positives_;
  const Ladder& ladder_;
  const Near& near_;
  std::vector<int64_t> ends_;  // [p]: valid pairs of the positives up to and including p
};

void check(const TripletTable& table, double margin) {
  if (std::isnan(margin)) throw std::invalid_argument("`margin` must be a number, got NaN");
  if (table.rows >= std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument("`embeddings` must have fewer than 2^31 rows");
}

int worth(int threads, const TripletTable& table, int64_t anchors) {
  return anchors * table.rows * table.dim < kSerialWork ? 1 : threads;
}

// Calls body(b, positives, pairs, near) for each of the anchors `chosen`.
template <typename Body>
void scan(const TripletAnchors& anchors, const TripletTable& table, double margin, bool pull,
          const std::vector<int64_t>& chosen, int threads, const Body& body) {
  const auto count = static_cast<int64_t>(chosen.size());
  int64_t size = kNearAnchors;
  for (int64_t first = 0; first < count;) {
    const int64_t end = std::min(count, first + size);
    std::vector<NearAnchor> group(static_cast<size_t>(end - first));
    std::vector<Positives> positives(group.size());
    parallel_for(end - first, threads, [&](int64_t i) {
      const int64_t b = chosen[static_cast<size_t>(first + i)];
      auto& own = positives[static_cast<size_t>(i)];
      const AnchorPartners partners = partners_of(table, anchors.labels[b], anchors.rows[b]);
      for (int64_t p = 0; p < partners.positives(); ++p)
        own.rows.push_back(row_at(table, partners.positive_place(p)));
      const float* const embedding = anchors.embeddings + b * table.dim;
      std::vector<double> distances(own.rows.size());
      exact_distances(embedding, table.embeddings, own.rows, table.dim, distances.data());
      double farthest = -1;
      for (size_t p = 0; p < distances.size(); ++p) {
        if (distances[p] > farthest) farthest = distances[p], own.farthest = own.rows[p];
        distances[p] += margin;
      }
      group[static_cast<size_t>(i)] = {embedding, anchors.labels[b], Ladder(distances)};
    });
    const auto near = near_rows(group, table, pull, kMostFound, threads);
    if (near.empty()) {  // more than there is room for
      size = (end - first + 1) / 2;
      continue;
    }
    parallel_for(end - first, threads, [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      body(chosen[static_cast<size_t>(first + i)], positives[at],
           AnchorPairs(positives[at], group[at].ladder, near[at]), near[at]);
    });
    first = end;
  }
}

// Which pairs of an anchor are taken, and where each goes: ranks ascending.
struct Chosen {
  std::vector<int64_t> ranks;
  std::vector<size_t> places;
};

Chosen choose(const TripletDraw& draw, uint64_t row, int64_t count, int64_t tried) {
  const int64_t T = draw.triplets;
  Chosen chosen;
  if (draw.first >= 0 || count <= T) {
    const int64_t first = std::max<int64_t>(draw.first, 0);
    chosen.ranks.resize(static_cast<size_t>(std::clamp<int64_t>(count - first, 0, T)));
    chosen.places.resize(chosen.ranks.size());
    std::iota(chosen.ranks.begin(), chosen.ranks.end(), first);
    std::iota(chosen.places.begin(), chosen.places.end(), size_t{0});
    return chosen;
  }
  std::vector<std::pair<int64_t, size_t>> drawn;
  for (int64_t t = tried; t < T; ++t)
    drawn.emplace_back(
        static_cast<int64_t>(
            scale_to(philox(static_cast<std::uint32_t>(t), row, kStreamTriplets, draw.seed).first,
                     static_cast<uint64_t>(count))),
        static_cast<size_t>(t));
  std::sort(drawn.begin(), drawn.end());
  for (const auto& [rank, place] : drawn) {
    chosen.ranks.push_back(rank);
    chosen.places.push_back(place);
  }
  return chosen;
}

}  // namespace

void sample_triplets(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     const TripletDraw& draw, int threads, const TripletOutputs& out) {
  check(table, margin);
  const int64_t T = draw.triplets;
  threads = worth(threads, table, anchors.count);
  std::vector<std::vector<std::pair<int64_t, int64_t>>> kept(static_cast<size_t>(anchors.count));
  const auto place = [&](int64_t b, int64_t t, int64_t positive, int64_t negative) {
    out.positives[b * T + t] = positive;
    out.negatives[b * T + t] = negative;
  };
  // Anchors of one label follow each other, whose positives are then in the cache.
  std::vector<int64_t> order(static_cast<size_t>(anchors.count));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return std::pair(anchors.labels[x], x) < std::pair(anchors.labels[y], y);
  });
  parallel_for(anchors.count, threads, [&](int64_t i) {
    const int64_t b = order[static_cast<size_t>(i)];
    std::fill_n(out.positives + b * T, T, int64_t{-1});
    std::fill_n(out.negatives + b * T, T, int64_t{-1});
    std::fill_n(out.hardest + 2 * b, 2, int64_t{-1});
    out.exact[b] = true;
    if (draw.first >= 0) return;
    Tried tried = try_pairs(anchors.embeddings + b * table.dim, anchors.rows[b], table,
                            partners_of(table, anchors.labels[b], anchors.rows[b]), margin, draw);
    const auto known = std::min<size_t>(tried.kept.size(), static_cast<size_t>(T));
    tried.kept.resize(known);
    if (tried.enough) {
      out.exact[b] = false;
      out.counts[b] = tried.count;
      for (size_t t = 0; t < known; ++t)
        place(b, static_cast<int64_t>(t), tried.kept[t].first, tried.kept[t].second);
    } else {
      kept[static_cast<size_t>(b)] = std::move(tried.kept);
    }
  });
  std::vector<int64_t> rest;
  for (int64_t b = 0; b < anchors.count; ++b)
    if (out.exact[b]) rest.push_back(b);
  scan(anchors, table, margin, false, rest, threads,
       [&](int64_t b, const Positives&, const AnchorPairs& pairs, const Near&) {
         const int64_t V = out.counts[b] = pairs.count();
         const auto extreme = pairs.hardest();
         std::copy(extreme.begin(), extreme.end(), out.hardest + 2 * b);
         const auto& tried = kept[static_cast<size_t>(b)];
         const auto chosen = choose(draw, static_cast<uint64_t>(anchors.rows[b]), V,
                                    static_cast<int64_t>(tried.size()));
         pairs.at(chosen.ranks, [&](size_t i, int64_t positive, int64_t negative) {
           place(b, static_cast<int64_t>(chosen.places[i]), positive, negative);
         });
         for (size_t t = 0; V > T && t < tried.size(); ++t)
           place(b, static_cast<int64_t>(t), tried[t].first, tried[t].second);
       });
}

void mean_cotangents(const TripletAnchors& anchors, const TripletTable& table, double margin,
                     int threads, float* cotangents, int64_t* counts, int64_t* hardest) {
  check(table, margin);
  threads = worth(threads, table, anchors.count);
  std::vector<int64_t> all(static_cast<size_t>(anchors.count));
  std::iota(all.begin(), all.end(), int64_t{0});
  scan(anchors, table, margin, true, all, threads,
       [&](int64_t b, const Positives& positives, const AnchorPairs& pairs, const Near& near) {
         counts[b] = pairs.count();
         const auto extreme = pairs.hardest();
         std::copy(extreme.begin(), extreme.end(), hardest + 2 * b);
         std::vector<double> total(near.pull);
         for (size_t p = 0; counts[b] > 0 && p < positives.rows.size(); ++p) {
           const float* const row = table.row(positives.rows[p]);
           const auto valid = static_cast<double>(pairs.count_of(p));
           for (int64_t d = 0; d < table.dim; ++d)
             total[static_cast<size_t>(d)] -= valid * static_cast<double>(row[d]);
         }
         const double scale = counts[b] > 0 ? 2.0 / static_cast<double>(counts[b]) : 0.0;
         for (int64_t d = 0; d < table.dim; ++d)
           cotangents[b * table.dim + d] =
               counts[b] > 0 ? static_cast<float>(scale * total[static_cast<size_t>(d)]) : 0.0F;
       });
}

}  // namespace gcfast
