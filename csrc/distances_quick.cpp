// Compiled with fused multiply-add and with sums in any order: nothing here decides what a bound on
// its error leaves open.
#include "clones.hpp"
#include "distances.hpp"

namespace gcfast {
namespace {

using std::int64_t;

// Vectors of `Lanes` anchors for each of `Rows` rows, held in registers over the dimensions.
template <int Lanes, int Rows, int Vectors>
inline __attribute__((always_inline)) void products(const float* rows, int64_t dim,
                                                    const float* packed, float* out) {
  typedef float Vector __attribute__((vector_size(4 * Lanes)));
  typedef float Loose __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  Vector total[Rows][Vectors];
  for (auto& row : total)
    for (auto& one : row) one = Vector{};
  for (int64_t d = 0; d < dim; ++d) {
    Vector anchors[Vectors];
    for (int v = 0; v < Vectors; ++v)
      anchors[v] = *reinterpret_cast<const Loose*>(packed + d * kProductAnchors + v * Lanes);
    for (int r = 0; r < Rows; ++r) {
      const float value = rows[r * dim + d];
      for (int v = 0; v < Vectors; ++v) total[r][v] += anchors[v] * value;
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      *reinterpret_cast<Loose*>(out + r * kProductAnchors + v * Lanes) = total[r][v];
}

template <int Lanes, int Vectors>
inline __attribute__((always_inline)) void all_products(const float* rows, int64_t count,
                                                        int64_t dim, const float* packed,
                                                        int64_t anchors, float* out) {
  for (int64_t first = 0; first < anchors; first += Lanes * Vectors) {
    if (count == kProductRows) {
      products<Lanes, kProductRows, Vectors>(rows, dim, packed + first, out + first);
    } else {
      for (int64_t r = 0; r < count; ++r)
        products<Lanes, 1, Vectors>(rows + r * dim, dim, packed + first,
                                    out + r * kProductAnchors + first);
    }
  }
}

#ifdef GCFAST_HAS_CLONES
__attribute__((target("avx512f"))) void products_avx512(const float* rows, int64_t count,
                                                        int64_t dim, const float* packed,
                                                        int64_t anchors, float* out) {
  if (anchors > 32) return all_products<16, 4>(rows, count, dim, packed, anchors, out);
  all_products<16, 1>(rows, count, dim, packed, anchors, out);
}

__attribute__((target("avx2,fma"))) void products_avx2(const float* rows, int64_t count,
                                                       int64_t dim, const float* packed,
                                                       int64_t anchors, float* out) {
  all_products<8, 2>(rows, count, dim, packed, anchors, out);
}
#endif

}  // namespace

GCFAST_CLONES
float quick_distance(const float* x, const float* y, int64_t dim) {
  float total = 0;
  for (int64_t d = 0; d < dim; ++d) total += (x[d] - y[d]) * (x[d] - y[d]);
  return total;
}

GCFAST_CLONES
double quick_distance_double(const float* x, const float* y, int64_t dim) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(y[d]);
    total += difference * difference;
  }
  return total;
}

GCFAST_CLONES
float quick_square(const float* x, int64_t dim) {
  float total = 0;
  for (int64_t d = 0; d < dim; ++d) total += x[d] * x[d];
  return total;
}

void quick_products(const float* rows, int64_t count, int64_t dim, const float* packed,
                    int64_t anchors, float* out) {
#ifdef GCFAST_HAS_CLONES
  static const bool avx512 = __builtin_cpu_supports("avx512f");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return products_avx512(rows, count, dim, packed, anchors, out);
  if (avx2) return products_avx2(rows, count, dim, packed, anchors, out);
#endif
  all_products<4, 2>(rows, count, dim, packed, anchors, out);
}

}  // namespace gcfast
