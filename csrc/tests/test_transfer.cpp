// The transfer engine without Python and without FAISS; the index is a brute-force search here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <future>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../parallel_for.hpp"
#include "../transfer_engine.hpp"
#include "check.hpp"

namespace {

using namespace gcfast;
using std::int64_t;
using std::size_t;

constexpr int64_t kDim = 11, kWidth = 6, kChannels = 17;

struct Rows {
  explicit Rows(int64_t count) : rows(count) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * kDim; ++i)
      embeddings.push_back(static_cast<float>(random() % 5));  // many equal distances
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<int64_t> all(kChannels);
      std::iota(all.begin(), all.end(), int64_t{0});
      std::shuffle(all.begin(), all.end(), random);
      channels.insert(channels.end(), all.begin(), all.begin() + kWidth);
      for (int64_t m = 0; m < kWidth; ++m) weights.push_back(normal(random));
      offsets.push_back(normal(random));
      labels.push_back(static_cast<int64_t>(random() % 4));
    }
  }

  Table table(std::vector<int64_t> ends = {}) const {
    ends.push_back(rows);
    std::vector<Shard> shards;
    int64_t start = 0;
    for (const int64_t end : ends) {
      shards.push_back({end - start, embeddings.data() + start * kDim,
                        channels.data() + start * kWidth, weights.data() + start * kWidth,
                        offsets.data() + start, labels.data() + start, false, false});
      start = end;
    }
    return {std::move(shards), kDim, kWidth};
  }

  double distance(const float* query, int64_t row) const {
    double total = 0;
    for (int64_t d = 0; d < kDim; ++d)
      total += std::pow(static_cast<double>(query[d]) -
                            static_cast<double>(embeddings[static_cast<size_t>(row * kDim + d)]),
                        2);
    return total;
  }

  // The k nearest in no particular order, -1 where there are fewer.
  SearchFunction search() const {
    return [this](int64_t n, const float* queries, int64_t k, float*, int64_t* ids) {
      for (int64_t q = 0; q < n; ++q) {
        std::vector<std::pair<double, int64_t>> all;
        for (int64_t i = 0; i < rows; ++i) all.emplace_back(distance(queries + q * kDim, i), i);
        std::sort(all.begin(), all.end());
        for (int64_t i = 0; i < k; ++i)
          ids[q * k + (k - 1 - i)] = i < rows ? all[static_cast<size_t>(i)].second : -1;
      }
    };
  }

  int64_t rows;
  std::vector<float> embeddings, weights, offsets;
  std::vector<int64_t> channels, labels;
};

std::vector<float> queries(int64_t count, unsigned seed = 3) {
  std::mt19937 random(seed);
  std::vector<float> out;
  for (int64_t i = 0; i < count * kDim; ++i) out.push_back(static_cast<float>(random() % 5));
  return out;
}

TransferEngine::Options options(int threads, int64_t memory = 1 << 26) { return {threads, memory}; }

void check_result(const Rows& rows, const std::vector<float>& asked, const TransferRequest& request,
                  const TransferResult& got) {
  const int64_t k = request.k;
  int64_t widest = 1;
  for (int64_t b = 0; b < got.count; ++b) {
    std::vector<std::pair<double, int64_t>> all;
    for (int64_t i = 0; i < rows.rows; ++i)
      all.emplace_back(rows.distance(asked.data() + b * kDim, i), i);
    std::sort(all.begin(), all.end());
    std::map<int64_t, double> mixed;
    const int64_t there = std::min(k, rows.rows);
    double total = 0, offset = 0;
    for (int64_t i = 0; i < there; ++i)
      total += std::exp(-(all[static_cast<size_t>(i)].first - all[0].first) / request.temperature);
    for (int64_t i = 0; i < k; ++i) {
      const auto at = static_cast<size_t>(b * k + i);
      if (i >= there) {
        CHECK(got.neighbors[at] == -1 && got.labels[at] == -1 && std::isinf(got.distances[at]));
        continue;
      }
      const auto [distance, row] = all[static_cast<size_t>(i)];
      CHECK(got.neighbors[at] == row);  // ties to the lower row
      CHECK(got.distances[at] == static_cast<float>(distance));
      CHECK(got.labels[at] == rows.labels[static_cast<size_t>(row)]);
      const double share = std::exp(-(distance - all[0].first) / request.temperature) / total;
      for (int64_t m = 0; m < kWidth; ++m) {
        const auto from = static_cast<size_t>(row * kWidth + m);
        mixed[rows.channels[from]] += share * static_cast<double>(rows.weights[from]);
      }
      offset += share * static_cast<double>(rows.offsets[static_cast<size_t>(row)]);
    }
    CHECK(got.rows[static_cast<size_t>(b)] == b);
    CHECK(std::abs(static_cast<double>(got.offsets[b]) - offset) < 1e-5);
    widest = std::max(widest, static_cast<int64_t>(mixed.size()));
    std::map<int64_t, double> summed;
    for (int64_t m = 0; m < got.width; ++m)
      summed[got.channels[b * got.width + m]] +=
          static_cast<double>(got.weights[b * got.width + m]);
    CHECK(summed.size() == mixed.size());
    for (const auto& [channel, weight] : mixed) CHECK(std::abs(summed[channel] - weight) < 1e-5);
  }
  CHECK(got.width == widest);
}

bool same(const TransferResult& a, const TransferResult& b) {
  const int64_t pairs = a.count * a.k, size = a.count * a.width;
  return a.count == b.count && a.width == b.width &&
         std::equal(a.neighbors.get(), a.neighbors.get() + pairs, b.neighbors.get()) &&
         std::equal(a.distances.get(), a.distances.get() + pairs, b.distances.get()) &&
         std::equal(a.labels.get(), a.labels.get() + pairs, b.labels.get()) &&
         std::equal(a.rows.get(), a.rows.get() + a.count, b.rows.get()) &&
         std::equal(a.channels, a.channels + size, b.channels) &&
         std::equal(a.weights, a.weights + size, b.weights) &&
         std::equal(a.offsets, a.offsets + a.count, b.offsets);
}

}  // namespace

TEST(results_are_those_of_brute_force) {
  for (const int64_t count : {3, 150}) {
    const Rows rows(count);
    const auto asked = queries(40);
    for (const int64_t k : {1, 5}) {
      const TransferRequest request{k, 2.0, true};
      const TransferEngine engine(
          rows.table(count > 3 ? std::vector<int64_t>{1, 1, 80} : std::vector<int64_t>{}),
          rows.search(), options(2));
      check_result(rows, asked, request, engine.transfer(asked.data(), 40, request, {}));
    }
  }
}

TEST(any_number_of_threads_and_any_split_give_the_same_bits) {
  const Rows rows(60);
  const auto asked = queries(2500);
  for (const int64_t k : {1, 4}) {
    const TransferRequest request{k, 2.0, true};
    const TransferEngine alone(rows.table(), rows.search(), options(1));
    const auto wanted = alone.transfer(asked.data(), 2500, request, {});
    for (const int threads : {2, 7})
      for (const int64_t memory : {int64_t{1}, int64_t{100000}, int64_t{1} << 26}) {
        if (memory == 1 && threads == 7) continue;
        const TransferEngine engine(rows.table({20}), rows.search(), options(threads, memory));
        CHECK(same(engine.transfer(asked.data(), 2500, request, {}), wanted));
      }
  }
}

TEST(eight_threads_share_an_engine) {
  const Rows rows(40);
  const TransferEngine engine(rows.table({13}), rows.search(), options(3));
  const TransferRequest request{3, 2.0, true};
  std::vector<std::future<void>> running;
  for (unsigned t = 0; t < 8; ++t)
    running.push_back(std::async(std::launch::async, [&, t] {
      const auto asked = queries(700, t);
      const auto wanted = engine.transfer(asked.data(), 700, request, {});
      for (int i = 0; i < 5; ++i)
        CHECK(same(engine.transfer(asked.data(), 700, request, {}), wanted));
    }));
  for (auto& one : running) one.get();
}

TEST(buffers_are_filled) {
  const Rows rows(30);
  const TransferEngine engine(rows.table(), rows.search(), options(2));
  const auto asked = queries(9);
  for (const int64_t k : {1, 3}) {
    const TransferRequest request{k, 2.0, true};
    std::vector<int64_t> channels(static_cast<size_t>(9 * k * kWidth));
    std::vector<float> weights(channels.size()), offsets(9);
    const TransferBuffers buffers{channels.data(), weights.data(), offsets.data()};
    const auto got = engine.transfer(asked.data(), 9, request, buffers);
    CHECK(got.channels == channels.data() && got.offsets == offsets.data());
    CHECK(got.own_channels == nullptr && got.own_offsets == nullptr);
    CHECK(same(got, engine.transfer(asked.data(), 9, request, {})));
  }
}

TEST(exceptions_of_the_index_reach_the_caller) {
  const Rows rows(10);
  int calls = 0;
  const TransferEngine engine(
      rows.table(),
      [&](int64_t n, const float*, int64_t k, float*, int64_t* ids) {
        if (++calls == 1) throw std::domain_error("not now");
        std::fill_n(ids, n * k, calls > 2 ? 10 : 1);
      },
      options(2));
  const TransferRequest request{2, 1.0, true};
  const auto asked = queries(4);
  CHECK(MESSAGE_OF(std::domain_error, engine.transfer(asked.data(), 4, request, {})) == "not now");
  (void)engine.transfer(asked.data(), 4, request, {});
  CHECK(MESSAGE_OF(std::invalid_argument, engine.transfer(asked.data(), 4, request, {})) ==
        "`index` must number the database's rows, 0 to 9, it returned 10");
}

TEST(a_loop_runs_each_task_once_and_keeps_its_first_exception) {
  std::vector<std::future<void>> running;
  for (int t = 0; t < 4; ++t)
    running.push_back(std::async(std::launch::async, [] {
      for (int round = 0; round < 200; ++round) {
        std::vector<int> seen(37);
        parallel_for(37, round % 6, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
        CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
      }
    }));
  for (auto& one : running) one.get();
  CHECK(MESSAGE_OF(std::range_error, parallel_for(100, 4, [](int64_t i) {
                     if (i % 10 == 3) throw std::range_error("in a task");
                   })) == "in a task");
  parallel_for(0, 4, [](int64_t) { CHECK(false); });
}
