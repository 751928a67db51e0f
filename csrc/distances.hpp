// Squared distances: exact ones, as the specification has them, and quick ones of bounded error.
#pragma once

#include <cstdint>
#include <vector>

namespace gcfast {

// In float64, summed in the order of the dimensions, each step rounded: what decides at the hinge.
double exact_distance(const float* x, const float* y, std::int64_t dim);

// The same for many rows of a table.
void exact_distances(const float* anchor, const float* table, const std::vector<std::int64_t>& rows,
                     std::int64_t dim, double* out);

// In any order, with fused multiply-add where the processor has it. Off by less than
// `relative_error(dim)` of itself, in units of the last place of float32 or float64, unless it
// is too large (`kLargest`) or too small (`kTiny`) for float32.
float quick_distance(const float* x, const float* y, std::int64_t dim);
double quick_distance_double(const float* x, const float* y, std::int64_t dim);
float quick_square(const float* x, std::int64_t dim);
// To `scale` times the codes, signed bytes.
float quick_sketched_distance(const float* x, const std::uint8_t* codes, float scale,
                              std::int64_t dim);

// A sum of D squares of differences has D + 2 roundings at most; twice that.
constexpr double relative_error(std::int64_t dim, double unit) {
  return 2.0 * static_cast<double>(dim + 8) * unit;
}
constexpr double kUnit = 1.0 / (1 << 24);  // roundoff of float32
constexpr double kUnitDouble = 1.0 / (1LL << 53);
constexpr float kLargest = 3.0e38F;
constexpr double kTiny = 1e-30;

// Inner products of a few rows with up to 64 anchors: out[row][anchor].
constexpr std::int64_t kProductRows = 6;
constexpr std::int64_t kProductAnchors = 64;
// `packed` is [dim][kProductAnchors]; `count` <= kProductRows; `anchors` are the first that count.
void quick_products(const float* rows, std::int64_t count, std::int64_t dim, const float* packed,
                    std::int64_t anchors, float* out);

}  // namespace gcfast
