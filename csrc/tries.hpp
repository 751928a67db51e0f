// Pairs tried for an anchor until enough are valid, without a look at the rest of the table: the
// rules are those of gcfast/reference/triplets.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "anchor_partners.hpp"

namespace gcfast {

struct Tried {
  std::vector<std::pair<std::int64_t, std::int64_t>> kept;  // the valid tries, in order
  bool enough;         // more than T of them are different: the anchor needs no scan
  std::int64_t count;  // then: an estimate of its valid pairs
};

Tried try_pairs(const float* anchor, std::int64_t anchor_row, const TripletTable& table,
                const AnchorPartners& partners, double margin, const TripletDraw& draw);

}  // namespace gcfast
