// Where the positives and negatives of an anchor stand in the order of (label, row).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "sample_triplets.hpp"

namespace gcfast {

struct AnchorPartners {
  std::int64_t start, end;  // places of the anchor's label
  std::int64_t own;         // the anchor's own place, or -1
  std::int64_t rows;

  std::int64_t positives() const { return end - start - (own >= 0 ? 1 : 0); }
  std::int64_t negatives() const { return rows - (end - start); }
  std::int64_t positive_place(std::int64_t i) const {
    return start + i + (own >= 0 && start + i >= own ? 1 : 0);
  }
  std::int64_t negative_place(std::int64_t i) const { return i < start ? i : i + (end - start); }
};

// The row at a place of the order.
inline std::int64_t row_at(const TripletTable& table, std::int64_t place) {
  const std::int64_t row = table.by_label[place];
  if (row < 0 || row >= table.rows)
    throw std::invalid_argument("`by_label` must hold the numbers of all rows");
  return row;
}

inline AnchorPartners partners_of(const TripletTable& table, std::int64_t label,
                                  std::int64_t anchor_row) {
  const auto first_place = [](std::int64_t low, std::int64_t high, const auto& before) {
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      before(middle) ? low = middle + 1 : high = middle;
    }
    return low;
  };
  const auto label_at = [&](std::int64_t place) { return table.labels[row_at(table, place)]; };
  AnchorPartners found{0, 0, -1, table.rows};
  found.start = first_place(0, table.rows, [&](auto place) { return label_at(place) < label; });
  found.end =
      first_place(found.start, table.rows, [&](auto place) { return label_at(place) <= label; });
  const std::int64_t place =
      first_place(found.start, found.end, [&](auto at) { return row_at(table, at) < anchor_row; });
  if (place < found.end && row_at(table, place) == anchor_row) found.own = place;
  return found;
}

}  // namespace gcfast
