#include "transfer_engine.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "parallel_for.hpp"

namespace gcfast {
namespace {

using std::int64_t;
using std::size_t;

constexpr int64_t kBlock = 64;             // queries that one thread takes at a time
constexpr int64_t kThreadBytes = 1 << 17;  // of rows, below which another thread does not pay

int64_t blocks_of(int64_t queries) { return (queries + kBlock - 1) / kBlock; }

void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < -1 || ids[i] >= rows)
      throw std::invalid_argument("`index` must number the database's rows, 0 to " +
                                  std::to_string(rows - 1) + ", it returned " +
                                  std::to_string(ids[i]));
}

}  // namespace

TransferEngine::TransferEngine(Table table, SearchFunction search, Options options)
    : table_(std::move(table)), search_(std::move(search)), options_(options) {}

int64_t TransferEngine::queries_at_once(int64_t memory_bytes, int64_t dim, int64_t k) {
  // The query as the index may copy it, ids and distances here and in the index.
  return std::max<int64_t>(1, memory_bytes / (4 * dim + 24 * k));
}

TransferResult TransferEngine::transfer(const float* queries, int64_t count,
                                        const TransferRequest& request,
                                        const TransferBuffers& buffers) const {
  const int64_t k = request.k, dim = table_.dim();
  TransferResult out;
  out.count = count;
  out.k = k;
  out.neighbors = room<int64_t>(count * k);
  out.distances = room<float>(count * k);
  // Rows of class proxies have no channels to mix.
  const bool merging = request.gather && k > 1 && table_.width() > 0;
  if (request.gather) {
    out.labels = room<int64_t>(count * k);
    out.rows = room<int64_t>(count);
    if (buffers.offsets == nullptr) out.own_offsets = room<float>(count);
    out.offsets = buffers.offsets == nullptr ? out.own_offsets.get() : buffers.offsets;
    if (!merging) {
      out.width = table_.width();
      make_room(out, buffers);
      if (k > 1) {
        std::fill_n(out.rows.get(), count, int64_t{-1});
        std::fill_n(out.offsets, count, 0.0f);
      }
    }
  }
  const auto loop = [this](int64_t tasks, int64_t bytes, const auto& body) {
    const int64_t most = std::max<int64_t>(bytes / kThreadBytes, 1);
    parallel_for(tasks, static_cast<int>(std::min<int64_t>(options_.threads, most)), body);
  };

  const int64_t step =
      std::min(queries_at_once(options_.memory_bytes, dim, k), std::max<int64_t>(count, 1));
  const auto ids = room<int64_t>(step * k);
  const auto unused = room<float>(step * k);
  int64_t widest = 1;
  std::vector<int64_t> widths;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = std::min(step, count - first);
    const Found found{queries + first * dim, ids.get(), first};
    search_(n, found.queries, k, unused.get(), ids.get());
    check_ids(ids.get(), n * k, table_.rows());
    const int64_t blocks = blocks_of(n);
    widths.assign(static_cast<size_t>(blocks), 1);
    loop(blocks, n * k * (4 * dim + 12 * out.width), [&](int64_t i) {
      const int64_t begin = i * kBlock, end = std::min(n, begin + kBlock);
      Gatherer(table_, request, found, out).run(begin, end);
      if (merging)
        widths[static_cast<size_t>(i)] =
            Mixer(table_, request, out).widest(first + begin, first + end);
    });
    for (const int64_t width : widths) widest = std::max(widest, width);
  }
  if (merging) {
    out.width = widest;
    make_room(out, buffers);
    loop(blocks_of(count), count * out.width * 12, [&](int64_t i) {
      Mixer(table_, request, out).run(i * kBlock, std::min(count, (i + 1) * kBlock));
    });
  }
  return out;
}

}  // namespace gcfast
