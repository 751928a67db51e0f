// The counter-based generator that draws are made with: Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace gcfast {

// The generator's last counter word: one stream for each use (gcfast/reference/triplets.py).
constexpr std::uint32_t kStreamTriplets = 0;
constexpr std::uint32_t kStreamTries = 4;

struct RandomWords {
  std::uint64_t first, second;
};

inline RandomWords philox(std::uint32_t draw, std::uint64_t row, std::uint32_t stream,
                          std::uint64_t seed) {
  std::array<std::uint32_t, 4> c{draw, static_cast<std::uint32_t>(row),
                                 static_cast<std::uint32_t>(row >> 32), stream};
  auto k0 = static_cast<std::uint32_t>(seed);
  auto k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ k0,
         static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ k1,
         static_cast<std::uint32_t>(product0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {(std::uint64_t{c[1]} << 32) | c[0], (std::uint64_t{c[3]} << 32) | c[2]};
}

// floor(x * count / 2^64), by 32-bit halves: uniform in [0, count).
inline std::uint64_t scale_to(std::uint64_t x, std::uint64_t count) {
  const std::uint64_t mask = 0xFFFFFFFFu;
  const std::uint64_t middle = (x >> 32) * (count & mask) + (((x & mask) * (count & mask)) >> 32);
  const std::uint64_t carry = (x & mask) * (count >> 32) + (middle & mask);
  return (x >> 32) * (count >> 32) + (middle >> 32) + (carry >> 32);
}

}  // namespace gcfast
