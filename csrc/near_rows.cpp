#include "near_rows.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "clones.hpp"
#include "distances.hpp"
#include "parallel_for.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kStretches = 128;     // at most, of rows
constexpr int64_t kStretchRows = 2046;  // at least: whole blocks of products
constexpr int64_t kTileRows = 510;      // whole blocks, too
constexpr int64_t kMostSlices = 4096;

// total[d] += factor * row[d]
GCFAST_CLONES
void add_scaled(double* total, const float* row, double factor, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) total[d] += factor * static_cast<double>(row[d]);
}

using Flags = std::array<std::uint8_t, kProductRows * kProductAnchors>;

// Flags the products that say that a row may be under an anchor's limit. NaN says so, too.
GCFAST_CLONES
void flag_under(const float* products, const float* floors, const float* squares, float rest,
                int64_t count, std::uint8_t* flags) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t a = 0; a < kProductAnchors; ++a)
      flags[r * kProductAnchors + a] =
          2 * products[r * kProductAnchors + a] < floors[a] + squares[r] * rest ? 0 : 1;
}

struct Hit {
  std::int32_t row;  // of the tile
  float product;
};

// Rows of a tile that may be under an anchor's limit.
struct Tile {
  std::array<float, kTileRows> squares{};  // minus infinity where float32 cannot hold them
  std::array<int64_t, kNearAnchors> counts{};
  std::vector<Hit> hits = std::vector<Hit>(static_cast<size_t>(kNearAnchors * kTileRows));
};

struct Contender {  // for the nearest negative of all
  double least;     // its distance is at least that
  std::uint32_t row;
  std::int32_t anchor;
};

struct Stretch {
  std::vector<NearRows> under;  // of each anchor
  std::vector<Contender> contenders;
  std::vector<double> pull;  // [anchors, dim]
};

void lower_to(std::atomic<double>& bound, double value) {
  double seen = bound.load(std::memory_order_relaxed);
  while (value < seen && !bound.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

class Search {
 public:
  Search(const std::vector<NearAnchor>& anchors, const TripletTable& table, bool pull,
         int64_t most_found)
      : anchors_(anchors),
        table_(table),
        pull_(pull),
        most_found_(most_found),
        packed_(static_cast<size_t>(table.dim * kProductAnchors), 0.0F),
        share_(2 * relative_error(table.dim, kUnit)),
        nearest_(anchors.size()) {
    for (size_t a = 0; a < anchors.size(); ++a) {
      for (int64_t d = 0; d < table.dim; ++d)
        packed_[static_cast<size_t>(d * kProductAnchors) + a] = anchors[a].embedding[d];
      squares_.push_back(quick_square(anchors[a].embedding, table.dim));
      nearest_[a].store(kInfinity, std::memory_order_relaxed);
    }
  }

  bool full() const { return full_; }

  void run(int64_t begin, int64_t end, Stretch& out) {
    out.under.resize(anchors_.size());
    if (pull_) out.pull.assign(anchors_.size() * static_cast<size_t>(table_.dim), 0.0);
    std::array<double, kNearAnchors> nearest{};
    for (size_t a = 0; a < anchors_.size(); ++a)
      nearest[a] = nearest_[a].load(std::memory_order_relaxed);
    Tile tile;
    int64_t size = kProductRows;  // of the first tile, which tells little of the nearest
    for (int64_t start = begin; start < end && !full_; start += size) {
      if (start > begin) size = std::min(2 * size, kTileRows);
      find(start, std::min(end, start + size), nearest, tile);
      // One anchor after another, so that its ladder stays at hand.
      for (size_t a = 0; a < anchors_.size(); ++a) {
        const Hit* const hits = tile.hits.data() + static_cast<int64_t>(a) * kTileRows;
        for (int64_t i = 0; i < tile.counts[a]; ++i)
          take(a, start + hits[i].row, hits[i].product,
               tile.squares[static_cast<size_t>(hits[i].row)], nearest[a], out);
      }
    }
    for (size_t a = 0; a < anchors_.size(); ++a) lower_to(nearest_[a], nearest[a]);
    for (const auto& one : out.under) found_ += static_cast<int64_t>(one.rows.size());
    if (found_ > most_found_ && anchors_.size() > 1) full_ = true;
  }

  // The nearest of the contenders, which come in the order of their rows.
  void settle(const std::vector<Stretch>& stretches, std::vector<Near>& out) const {
    std::vector<double> best(anchors_.size(), kInfinity);
    for (const auto& stretch : stretches)
      for (const auto& one : stretch.contenders) {
        const auto a = static_cast<size_t>(one.anchor);
        if (one.least > nearest_[a].load(std::memory_order_relaxed)) continue;
        const double distance =
            exact_distance(table_.row(one.row), anchors_[a].embedding, table_.dim);
        if (distance < best[a]) best[a] = distance, out[a].nearest = one.row;
      }
  }

 private:
  // Rows that may be under the limit of an anchor, or nearer than the nearest that is known.
  void find(int64_t begin, int64_t end, const std::array<double, kNearAnchors>& nearest,
            Tile& tile) const {
    std::array<float, kProductAnchors> floors{};
    floors.fill(std::numeric_limits<float>::infinity());
    for (size_t a = 0; a < anchors_.size(); ++a) floors[a] = floor(a, nearest[a]);
    std::array<float, kProductRows * kProductAnchors> products{};
    Flags flags{};
    const auto rest = static_cast<float>(1 - share_);
    tile.counts.fill(0);
    for (int64_t start = begin; start < end; start += kProductRows) {
      const int64_t count = std::min(kProductRows, end - start);
      const float* const rows = table_.row(start);
      float* const squares = tile.squares.data() + (start - begin);
      quick_products(rows, count, table_.dim, packed_.data(), static_cast<int64_t>(anchors_.size()),
                     products.data());
      for (int64_t r = 0; r < count; ++r) {
        squares[r] = quick_square(rows + r * table_.dim, table_.dim);
        if (!(squares[r] < kLargest)) squares[r] = -std::numeric_limits<float>::infinity();
      }
      flag_under(products.data(), floors.data(), squares, rest, count, flags.data());
      for (int64_t word = 0; word < count * kProductAnchors; word += 8) {
        std::uint64_t any;
        std::memcpy(&any, flags.data() + word, sizeof any);
        if (any == 0) continue;
        const auto number = static_cast<std::int32_t>(start - begin + word / kProductAnchors);
        // All eight are written and those counted that are flagged: no branch to guess.
        for (int64_t i = word; i < word + 8; ++i) {
          const int64_t a = i % kProductAnchors;
          int64_t& hits = tile.counts[static_cast<size_t>(a)];
          tile.hits[static_cast<size_t>(a * kTileRows + hits)] = {number,
                                                                  products[static_cast<size_t>(i)]};
          hits += flags[static_cast<size_t>(i)];
        }
      }
    }
  }

  // Twice a product below this, plus the row's square, says that the distance is above the limit.
  // Squares too large for float32 say nothing, and minus infinity in their place lets all pass.
  float floor(size_t a, double nearest) const {
    const double limit = std::max(anchors_[a].ladder.top(), nearest);
    if (!(squares_[a] < kLargest)) return -std::numeric_limits<float>::infinity();
    return static_cast<float>(squares_[a] * (1 - share_) - limit);
  }

  void take(size_t a, int64_t number, float product, float square, double& nearest, Stretch& out) {
    const NearAnchor& anchor = anchors_[a];
    if (table_.labels[number] == anchor.label) return;
    const double squares = static_cast<double>(squares_[a]) + static_cast<double>(square);
    const double distance = squares - 2 * static_cast<double>(product);
    double least = distance - squares * share_, most = distance + squares * share_;
    int64_t step = anchor.ladder.above(least);
    const auto is_unsure = [&] {  // NaN is, too
      return step < anchor.ladder.steps() ? !(anchor.ladder.at(step) > most) : !(least <= most);
    };
    const bool is_finite = squares >= 0 && squares < static_cast<double>(kLargest);
    if (!is_finite || is_unsure() || least <= nearest) {
      const double closer = quick_distance_double(table_.row(number), anchor.embedding, table_.dim);
      const double error = closer * relative_error(table_.dim, kUnitDouble);
      least = closer - error, most = closer + error;
      step = anchor.ladder.above(least);
      if (!(closer < kInfinity) || is_unsure()) {
        least = most = exact_distance(table_.row(number), anchor.embedding, table_.dim);
        step = anchor.ladder.above(least);
      }
      if (least <= nearest) {
        out.contenders.push_back(
            {least, static_cast<std::uint32_t>(number), static_cast<std::int32_t>(a)});
        nearest = std::min(nearest, most);
      }
    }
    if (step == anchor.ladder.steps()) return;
    out.under[a].rows.push_back(static_cast<std::uint32_t>(number));
    out.under[a].steps.push_back(static_cast<std::int32_t>(step));
    if (pull_)
      add_scaled(out.pull.data() + a * static_cast<size_t>(table_.dim), table_.row(number),
                 static_cast<double>(anchor.ladder.steps() - step), table_.dim);
  }

  const std::vector<NearAnchor>& anchors_;
  const TripletTable& table_;
  bool pull_;
  int64_t most_found_;
  std::vector<float> packed_;   // [dim, kProductAnchors]
  std::vector<float> squares_;  // of the anchors
  // What a distance by products may be off by, in |a|^2 + |e|^2: both squares and the product have
  // D + 2 roundings, and four are left for what is done with them.
  double share_;
  std::vector<std::atomic<double>> nearest_;  // the nearest negative's distance is at most that
  std::atomic<int64_t> found_{0};
  std::atomic<bool> full_{false};
};

}  // namespace

Ladder::Ladder(const std::vector<double>& thresholds) : step_of_(thresholds.size()) {
  std::vector<std::pair<double, size_t>> order;
  for (const double threshold : thresholds)
    order.emplace_back(std::isnan(threshold) ? -kInfinity : threshold, order.size());
  std::sort(order.begin(), order.end());
  for (const auto& [threshold, p] : order) {
    step_of_[p] = steps();
    sorted_.push_back(threshold);
  }
  if (steps() < 2) return;
  const int64_t slices = std::min(kMostSlices, 2 * steps());
  const double range = sorted_.back() - sorted_.front();
  if (!(range > 0 && std::isfinite(range) && std::isfinite(static_cast<double>(slices) / range)))
    return;
  scale_ = static_cast<double>(slices) / range;
  int64_t step = 0;
  for (int64_t slice = 0; slice <= slices; ++slice) {
    const double edge = sorted_.front() + static_cast<double>(slice) / scale_;
    while (step + 1 < steps() && sorted_[static_cast<size_t>(step)] <= edge) ++step;
    first_.push_back(static_cast<std::int32_t>(step));
  }
}

double Ladder::top() const { return sorted_.empty() ? -kInfinity : sorted_.back(); }

int64_t Ladder::above(double distance) const {
  if (sorted_.empty() || !(distance < sorted_.back())) return steps();
  if (distance < sorted_.front()) return 0;
  if (scale_ == 0)
    return std::upper_bound(sorted_.begin(), sorted_.end(), distance) - sorted_.begin();
  // Where the slice points is right but for rounding and what lies inside of the slice.
  const auto slice = static_cast<size_t>((distance - sorted_.front()) * scale_);
  int64_t step = first_[std::min(slice, first_.size() - 1)];
  while (step > 0 && sorted_[static_cast<size_t>(step - 1)] > distance) --step;
  while (sorted_[static_cast<size_t>(step)] <= distance) ++step;
  return step;
}

std::vector<Near> near_rows(const std::vector<NearAnchor>& anchors, const TripletTable& table,
                            bool pull, std::int64_t most_found, int threads) {
  std::vector<Near> found(anchors.size());
  Search search(anchors, table, pull, most_found);
  int64_t size = std::max(kStretchRows, (table.rows + kStretches - 1) / kStretches);
  size = (size + kProductRows - 1) / kProductRows * kProductRows;
  std::vector<Stretch> stretches(static_cast<size_t>((table.rows + size - 1) / size));
  parallel_for(static_cast<int64_t>(stretches.size()), threads, [&](int64_t s) {
    search.run(s * size, std::min(table.rows, (s + 1) * size), stretches[static_cast<size_t>(s)]);
  });
  if (search.full()) return {};
  search.settle(stretches, found);
  const auto dim = static_cast<size_t>(table.dim);
  for (size_t a = 0; a < found.size(); ++a) {
    if (pull) found[a].pull.assign(dim, 0.0);
    for (auto& stretch : stretches) {
      found[a].parts.push_back(std::move(stretch.under[a]));
      for (size_t d = 0; pull && d < dim; ++d) found[a].pull[d] += stretch.pull[a * dim + d];
    }
  }
  return found;
}

}  // namespace gcfast
