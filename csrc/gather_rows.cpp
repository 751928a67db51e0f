#include "gather_rows.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;

constexpr int64_t kAhead = 8;  // queries whose rows are fetched before they are needed
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// By distance, NaN last, ties to the lower row.
bool nearer(const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
  const bool a_nan = std::isnan(a.first), b_nan = std::isnan(b.first);
  if (a_nan != b_nan) return b_nan;
  return !a_nan && a.first != b.first ? a.first < b.first : a.second < b.second;
}

// softmax(-distance / temperature) over the neighbors that were found, which come first.
void share(const float* distances, const int64_t* neighbors, int64_t k, double temperature,
           std::vector<double>& shares) {
  shares.clear();
  // Less the nearest distance, so that at temperature 0 (a table of twins) the nearest weighs 1.
  const double scale = std::max(temperature, static_cast<double>(FLT_MIN));
  double total = 0;
  for (int64_t i = 0; i < k && neighbors[i] >= 0; ++i) {
    const double beyond = static_cast<double>(distances[i]) - static_cast<double>(distances[0]);
    shares.push_back(std::exp(-beyond / scale));
    total += shares.back();
  }
  for (double& each : shares) each /= total;
}

}  // namespace

void make_room(TransferResult& out, const TransferBuffers& buffers) {
  const int64_t size = out.count * out.width;
  if (buffers.channels == nullptr) out.own_channels = room<int64_t>(size);
  if (buffers.weights == nullptr) out.own_weights = room<float>(size);
  out.channels = buffers.channels == nullptr ? out.own_channels.get() : buffers.channels;
  out.weights = buffers.weights == nullptr ? out.own_weights.get() : buffers.weights;
}

void Gatherer::run(int64_t begin, int64_t end) {
  for (int64_t q = begin; q < std::min(begin + kAhead, end); ++q) prefetch(q);
  for (int64_t q = begin; q < end; ++q) {
    if (q + kAhead < end) prefetch(q + kAhead);
    order(q);
    if (!request_.gather) continue;
    label(q);
    if (request_.k == 1) copy(q);
  }
}

void Gatherer::prefetch(int64_t query) const {
  const int64_t* const ids = found_.ids + query * request_.k;
  for (int64_t i = 0; i < request_.k; ++i)
    if (ids[i] >= 0) table_.prefetch(table_.at(ids[i]), request_.gather);
}

void Gatherer::order(int64_t query) {
  const int64_t k = request_.k;
  near_.clear();
  for (int64_t i = 0; i < k; ++i) {
    const int64_t id = found_.ids[query * k + i];
    if (id < 0) continue;
    const double distance =
        table_.squared_distance(table_.at(id), found_.queries + query * table_.dim());
    near_.emplace_back(static_cast<float>(distance), id);
  }
  std::sort(near_.begin(), near_.end(), nearer);
  const int64_t at = (found_.first + query) * k;
  for (int64_t i = 0; i < k; ++i) {
    const bool there = i < static_cast<int64_t>(near_.size());
    out_.distances[static_cast<size_t>(at + i)] =
        there ? near_[static_cast<size_t>(i)].first : kInfinity;
    out_.neighbors[static_cast<size_t>(at + i)] = there ? near_[static_cast<size_t>(i)].second : -1;
  }
}

void Gatherer::label(int64_t query) {
  const int64_t at = (found_.first + query) * request_.k;
  for (int64_t i = at; i < at + request_.k; ++i) {
    const int64_t id = out_.neighbors[static_cast<size_t>(i)];
    int64_t label = -1;
    if (id >= 0) {
      const Table::Row row = table_.at(id);
      label = row.shard->labels[row.row];
    }
    out_.labels[static_cast<size_t>(i)] = label;
  }
}

void Gatherer::copy(int64_t query) {
  const int64_t M = table_.width(), b = found_.first + query;
  const int64_t id = out_.neighbors[static_cast<size_t>(b)];
  out_.rows[static_cast<size_t>(b)] = id >= 0 ? b : -1;
  if (id < 0) {
    std::fill_n(out_.channels + b * M, M, int64_t{0});
    std::fill_n(out_.weights + b * M, M, 0.0f);
    out_.offsets[b] = 0;
    return;
  }
  const Table::Row at = table_.at(id);
  std::memcpy(out_.channels + b * M, at.shard->channels + at.row * M,
              static_cast<size_t>(M) * sizeof(int64_t));
  table_.copy_weights(at, out_.weights + b * M);
  out_.offsets[b] = at.shard->offsets[at.row];
}

Mixer::Mixer(const Table& table, const TransferRequest& request, TransferResult& out)
    : table_(table),
      request_(request),
      out_(out),
      merger_(request.k * table.width()),
      weights_(static_cast<size_t>(table.width())) {}

int64_t Mixer::widest(int64_t begin, int64_t end) {
  const int64_t k = request_.k, M = table_.width();
  int64_t widest = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* const neighbors = out_.neighbors.get() + b * k;
    merger_.clear();
    for (int64_t i = 0; i < k && neighbors[i] >= 0; ++i) {
      const Table::Row at = table_.at(neighbors[i]);
      for (int64_t m = 0; m < M; ++m) merger_.add(at.shard->channels[at.row * M + m], 0);
    }
    widest = std::max(widest, static_cast<int64_t>(merger_.channels().size()));
  }
  return widest;
}

void Mixer::run(int64_t begin, int64_t end) {
  for (int64_t b = begin; b < std::min(begin + kAhead, end); ++b) prefetch(b);
  for (int64_t b = begin; b < end; ++b) {
    if (b + kAhead < end) prefetch(b + kAhead);
    mix(b);
  }
}

void Mixer::prefetch(int64_t query) const {
  const int64_t* const neighbors = out_.neighbors.get() + query * request_.k;
  for (int64_t i = 0; i < request_.k && neighbors[i] >= 0; ++i)
    table_.prefetch_weights(table_.at(neighbors[i]));
}

void Mixer::mix(int64_t query) {
  const int64_t k = request_.k, M = table_.width();
  const int64_t* const neighbors = out_.neighbors.get() + query * k;
  share(out_.distances.get() + query * k, neighbors, k, request_.temperature, shares_);
  merger_.clear();
  double offset = 0;
  for (size_t i = 0; i < shares_.size(); ++i) {
    const Table::Row at = table_.at(neighbors[i]);
    const int64_t* const channels = at.shard->channels + at.row * M;
    table_.copy_weights(at, weights_.data());
    for (int64_t m = 0; m < M; ++m)
      merger_.add(channels[m], shares_[i] * static_cast<double>(weights_[static_cast<size_t>(m)]));
    offset += shares_[i] * static_cast<double>(at.shard->offsets[at.row]);
  }
  out_.rows[static_cast<size_t>(query)] = shares_.empty() ? -1 : query;
  out_.offsets[query] = static_cast<float>(offset);

  const auto& channels = merger_.channels();
  const auto& sums = merger_.sums();
  const auto own = static_cast<int64_t>(channels.size());
  int64_t* const to_channels = out_.channels + query * out_.width;
  float* const to_weights = out_.weights + query * out_.width;
  std::copy(channels.begin(), channels.end(), to_channels);
  std::transform(sums.begin(), sums.end(), to_weights,
                 [](double sum) { return static_cast<float>(sum); });
  std::fill_n(to_channels + own, out_.width - own, own > 0 ? to_channels[0] : 0);
  std::fill_n(to_weights + own, out_.width - own, 0.0f);
}

}  // namespace gcfast
