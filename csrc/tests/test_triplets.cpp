// The sampler under many threads, against itself on one: tests/ops/test_sample_triplets.py holds it
// to the reference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../sample_triplets.hpp"
#include "check.hpp"

namespace {

using std::int64_t;

struct Case {
  int64_t rows = 700, dim = 19, anchors = 300, triplets = 7;
  std::vector<float> embeddings;
  std::vector<int64_t> labels, by_label, anchor_rows;

  Case() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * dim; ++i) embeddings.push_back(normal(random));
    for (int64_t i = 0; i < rows; ++i) labels.push_back(static_cast<int64_t>(random() % 9));
    for (int64_t i = 0; i < anchors; ++i) anchor_rows.push_back(i);
    // Rows of label 0 are near each other and far from all others: they have no valid pair.
    for (std::size_t i = 0; i < embeddings.size(); ++i)
      if (labels[i / static_cast<std::size_t>(dim)] == 0)
        embeddings[i] = 100 + 0.001F * embeddings[i];
    for (int64_t i = 0; i < rows; ++i) by_label.push_back(i);
    std::stable_sort(by_label.begin(), by_label.end(), [this](int64_t a, int64_t b) {
      return labels[static_cast<std::size_t>(a)] < labels[static_cast<std::size_t>(b)];
    });
  }

  gcfast::TripletTable table() const {
    return {embeddings.data(), labels.data(), by_label.data(), rows, dim};
  }
  gcfast::TripletAnchors anchor() const {
    return {embeddings.data(), labels.data(), anchor_rows.data(), anchors};
  }

  std::vector<int64_t> sampled(int threads, int64_t first, int64_t tries) const {
    const auto pairs = static_cast<std::size_t>(anchors * triplets);
    std::vector<int64_t> positives(pairs), negatives(pairs);
    std::vector<int64_t> counts(static_cast<std::size_t>(anchors));
    std::vector<int64_t> hardest(static_cast<std::size_t>(2 * anchors));
    const auto exact = std::make_unique<bool[]>(static_cast<std::size_t>(anchors));
    gcfast::sample_triplets(
        anchor(), table(), 0.2, {triplets, 5, first, tries}, threads,
        {positives.data(), negatives.data(), counts.data(), hardest.data(), exact.get()});
    // Some anchors are filled by tries, and some are scanned.
    const auto scanned = std::count(exact.get(), exact.get() + anchors, true);
    CHECK(tries == 0 ? scanned == anchors : scanned > 0 && scanned < anchors);
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
  for (const auto& [first, tries] : {std::pair<int64_t, int64_t>{-1, 0}, {-1, 2048}, {3, 0}}) {
    const auto alone = given.sampled(1, first, tries);
    for (const int threads : {2, 7}) CHECK(given.sampled(threads, first, tries) == alone);
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
  bool exact[300];
  const gcfast::TripletOutputs outputs{out.data(), out.data(), out.data(), out.data(), exact};
  CHECK(MESSAGE_OF(std::invalid_argument,
                   gcfast::sample_triplets(given.anchor(), given.table(), std::nan(""),
                                           {1, 0, -1, 0}, 3, outputs)) ==
        "`margin` must be a number, got NaN");
  given.by_label.assign(given.by_label.size(), given.rows);
  CHECK(
      MESSAGE_OF(std::invalid_argument, gcfast::sample_triplets(given.anchor(), given.table(), 0.2,
                                                                {1, 0, -1, 1024}, 3, outputs)) ==
      "`by_label` must hold the numbers of all rows");
}
