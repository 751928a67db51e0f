// Compiled with fused multiply-add and with sums in any order: nothing here decides what a bound on
// its error leaves open. One build for every x86-64: each function has a version for each width of
// vectors, and the processor's widest is taken.
#include "distances.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::uint8_t;

#define GCFAST_INLINE inline __attribute__((always_inline))

// How many floats a vector of products holds, and how many of these are held for a row.
template <int LanesOf, int VectorsOf, int FewVectorsOf>
struct Width {
  static constexpr int kLanes = LanesOf, kVectors = VectorsOf, kFewVectors = FewVectorsOf;
};

GCFAST_INLINE float distance(const float* x, const float* y, int64_t dim) {
  float total = 0;
  for (int64_t d = 0; d < dim; ++d) total += (x[d] - y[d]) * (x[d] - y[d]);
  return total;
}

GCFAST_INLINE double distance_double(const float* x, const float* y, int64_t dim) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(y[d]);
    total += difference * difference;
  }
  return total;
}

GCFAST_INLINE float square(const float* x, int64_t dim) {
  float total = 0;
  for (int64_t d = 0; d < dim; ++d) total += x[d] * x[d];
  return total;
}

GCFAST_INLINE float sketched_distance(const float* x, const uint8_t* codes, float scale,
                                      int64_t dim) {
  float total = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float difference = x[d] - scale * static_cast<float>(static_cast<std::int8_t>(codes[d]));
    total += difference * difference;
  }
  return total;
}

// Vectors of anchors for each of `Rows` rows, held in registers over the dimensions.
template <int Lanes, int Rows, int Vectors>
GCFAST_INLINE void block_products(const float* rows, int64_t dim, const float* packed, float* out) {
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
GCFAST_INLINE void all_products(const float* rows, int64_t count, int64_t dim, const float* packed,
                                int64_t anchors, float* out) {
  for (int64_t first = 0; first < anchors; first += Lanes * Vectors) {
    if (count == kProductRows) {
      block_products<Lanes, kProductRows, Vectors>(rows, dim, packed + first, out + first);
    } else {
      for (int64_t r = 0; r < count; ++r)
        block_products<Lanes, 1, Vectors>(rows + r * dim, dim, packed + first,
                                          out + r * kProductAnchors + first);
    }
  }
}

template <typename W>
GCFAST_INLINE void products(const float* rows, int64_t count, int64_t dim, const float* packed,
                            int64_t anchors, float* out) {
  if (anchors > W::kLanes * W::kFewVectors)
    return all_products<W::kLanes, W::kVectors>(rows, count, dim, packed, anchors, out);
  all_products<W::kLanes, W::kFewVectors>(rows, count, dim, packed, anchors, out);
}

struct Versions {
  decltype(&quick_distance) distance;
  decltype(&quick_distance_double) distance_double;
  decltype(&quick_square) square;
  decltype(&quick_sketched_distance) sketched_distance;
  decltype(&quick_products) products;
};

// A version of all of them: TARGET stands before each, NAME is of the whole.
#define GCFAST_VERSION(TARGET, NAME, WIDTH)                                                     \
  struct NAME {                                                                                 \
    TARGET static float one(const float* x, const float* y, int64_t dim) {                      \
      return distance(x, y, dim);                                                               \
    }                                                                                           \
    TARGET static double two(const float* x, const float* y, int64_t dim) {                     \
      return distance_double(x, y, dim);                                                        \
    }                                                                                           \
    TARGET static float three(const float* x, int64_t dim) { return square(x, dim); }           \
    TARGET static float four(const float* x, const uint8_t* codes, float scale, int64_t dim) {  \
      return sketched_distance(x, codes, scale, dim);                                           \
    }                                                                                           \
    TARGET static void five(const float* rows, int64_t count, int64_t dim, const float* packed, \
                            int64_t anchors, float* out) {                                      \
      products<WIDTH>(rows, count, dim, packed, anchors, out);                                  \
    }                                                                                           \
    static constexpr Versions kAll{&one, &two, &three, &four, &five};                           \
  };

using Narrow = Width<4, 2, 1>;
using Middle = Width<8, 2, 1>;
using Wide = Width<16, 4, 1>;

GCFAST_VERSION(, Plain, Narrow)
#if defined(__x86_64__) && defined(__GNUC__)
GCFAST_VERSION(__attribute__((target("avx2,fma"))), Avx2, Middle)
#if defined(__clang__)
GCFAST_VERSION(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), Avx512, Wide)
#else
GCFAST_VERSION(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,"
                                     "prefer-vector-width=512"))),
               Avx512, Wide)
#endif
#endif

Versions best() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return Avx512::kAll;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2::kAll;
#endif
  return Plain::kAll;
}

const Versions& versions() {
  static const Versions chosen = best();
  return chosen;
}

}  // namespace

float quick_distance(const float* x, const float* y, int64_t dim) {
  return versions().distance(x, y, dim);
}

double quick_distance_double(const float* x, const float* y, int64_t dim) {
  return versions().distance_double(x, y, dim);
}

float quick_square(const float* x, int64_t dim) { return versions().square(x, dim); }

float quick_sketched_distance(const float* x, const uint8_t* codes, float scale, int64_t dim) {
  return versions().sketched_distance(x, codes, scale, dim);
}

void quick_products(const float* rows, int64_t count, int64_t dim, const float* packed,
                    int64_t anchors, float* out) {
  versions().products(rows, count, dim, packed, anchors, out);
}

}  // namespace gcfast
