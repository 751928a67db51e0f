// The sampler under many threads, against itself on one: tests/ops/test_sample_triplets.py holds it
// to the reference.
#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "../sample_triplets.hpp"
#include "check.hpp"

namespace {

using std::int64_t;

struct Case {
  int64_t rows = 700, dim = 19, anchors = 300, triplets = 7;
  std::vector<float> embeddings;
  std::vector<int64_t> labels, anchor_rows;

  Case() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * dim; ++i) embeddings.push_back(normal(random));
    for (int64_t i = 0; i < rows; ++i) labels.push_back(static_cast<int64_t>(random() % 9));
    for (int64_t i = 0; i < anchors; ++i) anchor_rows.push_back(i);
  }

  gcfast::TripletTable table() const { return {embeddings.data(), labels.data(), rows, dim}; }
  gcfast::TripletAnchors anchor() const {
    return {embeddings.data(), labels.data(), anchor_rows.data(), anchors};
  }

  std::vector<int64_t> sampled(int threads, int64_t first) const {
    const auto pairs = static_cast<std::size_t>(anchors * triplets);
    std::vector<int64_t> positives(pairs), negatives(pairs);
    std::vector<int64_t> counts(static_cast<std::size_t>(anchors));
    std::vector<int64_t> hardest(static_cast<std::size_t>(2 * anchors));
    gcfast::sample_triplets(anchor(), table(), 0.2, {triplets, 5, first}, threads, positives.data(),
                            negatives.data(), counts.data(), hardest.data());
    for (std::size_t i = 0; i < pairs; ++i) {
      if (positives[i] < 0) continue;
      const auto own = labels[i / static_cast<std::size_t>(triplets)];
      CHECK(labels[static_cast<std::size_t>(positives[i])] == own);
      CHECK(labels[static_cast<std::size_t>(negatives[i])] != own);
    }
    for (const auto* more : {&negatives, &counts, &hardest})
      positives.insert(positives.end(), more->begin(), more->end());
    return positives;
  }

  std::vector<float> cotangents(int threads) const {
    std::vector<float> out(static_cast<std::size_t>(anchors * dim));
    std::vector<int64_t> counts(static_cast<std::size_t>(anchors));
    std::vector<int64_t> hardest(static_cast<std::size_t>(2 * anchors));
    gcfast::mean_cotangents(anchor(), table(), 0.2, threads, out.data(), counts.data(),
                            hardest.data());
    return out;
  }
};

}  // namespace

TEST(draws_are_the_same_on_any_number_of_threads) {
  const Case given;
  for (const int64_t first : {int64_t{-1}, int64_t{0}, int64_t{3}}) {
    const auto alone = given.sampled(1, first);
    for (const int threads : {2, 7}) CHECK(given.sampled(threads, first) == alone);
  }
}

TEST(cotangents_are_the_same_on_any_number_of_threads) {
  const Case given;
  const auto alone = given.cotangents(1);
  for (const int threads : {2, 7}) CHECK(given.cotangents(threads) == alone);
}

TEST(an_exception_of_the_sampler_reaches_the_caller) {
  Case given;
  std::vector<int64_t> out(5000);
  CHECK(MESSAGE_OF(std::invalid_argument,
                   gcfast::sample_triplets(given.anchor(), given.table(), std::nan(""), {1, 0, -1},
                                           3, out.data(), out.data(), out.data(), out.data())) ==
        "`margin` must be a number, got NaN");
}
