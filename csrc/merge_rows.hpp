// Sums several sparse rows into one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gcfast {

// Sums (channel, value) pairs by channel; channels keep the order of their first appearance.
class RowMerger {
 public:
  explicit RowMerger(std::int64_t most_pairs) {
    std::size_t size = 16;
    while (size < 2 * static_cast<std::size_t>(most_pairs)) size *= 2;
    slots_.resize(size);
  }

  void clear() {
    if (++round_ == 0) {  // the counter wrapped around
      for (Slot& slot : slots_) slot.round = 0;
      round_ = 1;
    }
    channels_.clear();
    sums_.clear();
  }

  void add(std::int64_t channel, double value) {
    const std::size_t mask = slots_.size() - 1;
    // Fibonacci hashing (Knuth, TAOCP 3, 6.4): adjacent channels land far apart.
    auto at =
        static_cast<std::size_t>((static_cast<std::uint64_t>(channel) * 0x9E3779B97F4A7C15u) >> 32);
    for (;; ++at) {
      Slot& slot = slots_[at & mask];
      if (slot.round != round_) {
        slot = {channel, static_cast<std::uint32_t>(channels_.size()), round_};
        channels_.push_back(channel);
        sums_.push_back(value);
        return;
      }
      if (slot.channel == channel) {
        sums_[slot.place] += value;
        return;
      }
    }
  }

  const std::vector<std::int64_t>& channels() const { return channels_; }
  const std::vector<double>& sums() const { return sums_; }

 private:
  struct Slot {
    std::int64_t channel = 0;
    std::uint32_t place = 0;
    std::uint32_t round = 0;  // in which it was filled; clearing starts the next one
  };

  std::vector<Slot> slots_;
  std::vector<std::int64_t> channels_;
  std::vector<double> sums_;
  std::uint32_t round_ = 1;
};

}  // namespace gcfast
