#include "clones.hpp"
#include "distances.hpp"

namespace gcfast {

using std::int64_t;
using std::size_t;

double exact_distance(const float* x, const float* y, int64_t dim) {
  double total = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(y[d]);
    total += difference * difference;
  }
  return total;
}

GCFAST_CLONES
void exact_distances(const float* anchor, const float* table, const std::vector<int64_t>& rows,
                     int64_t dim, double* out) {
  // Eight sums side by side: each waits for its own last addition, not for the others'.
  constexpr size_t kTogether = 8;
  size_t i = 0;
  for (; i + kTogether <= rows.size(); i += kTogether) {
    double total[kTogether] = {};
    const float* row[kTogether];
    for (size_t j = 0; j < kTogether; ++j) row[j] = table + rows[i + j] * dim;
    for (int64_t d = 0; d < dim; ++d) {
      const double at = anchor[d];
      for (size_t j = 0; j < kTogether; ++j) {
        const double difference = static_cast<double>(row[j][d]) - at;
        total[j] += difference * difference;
      }
    }
    for (size_t j = 0; j < kTogether; ++j) out[i + j] = total[j];
  }
  for (; i < rows.size(); ++i) out[i] = exact_distance(table + rows[i] * dim, anchor, dim);
}

}  // namespace gcfast
