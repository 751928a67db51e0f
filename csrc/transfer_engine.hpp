// From embeddings to the channel weights of their nearest rows. The index is whatever a function
// says is near; nothing here knows of Python or of FAISS.
#pragma once

#include <cstdint>
#include <functional>

#include "gather_rows.hpp"
#include "table.hpp"

namespace gcfast {

// Writes the ids [n, k] of rows near each query [n, dim], -1 where it finds fewer, and distances of
// its own, which are not used. Several threads may call it at once.
using SearchFunction = std::function<void(std::int64_t n, const float* queries, std::int64_t k,
                                          float* distances, std::int64_t* ids)>;

// Searches, measures the rows that were found exactly, orders them (ties to the lower row), and
// gathers their channels, weights and offsets, one row per query. With k > 1 a query's rows are
// mixed by softmax(-distance / temperature) and merged: each channel that any of them has appears
// once, in the order of its first appearance from the nearest row on, with the sum of its mixed
// weights; the rows of a batch are as wide as its widest, the others repeat their first channel
// with weight 0.
//
// Results are the same bits for any number of threads. It keeps no state between calls, and any
// number of threads may call it at once.
class TransferEngine {
 public:
  struct Options {
    int threads;                // of measuring and gathering, the caller's among them
    std::int64_t memory_bytes;  // held at once beyond the result; one query is always taken
  };

  TransferEngine(Table table, SearchFunction search, Options options);

  const Table& table() const { return table_; }

  TransferResult transfer(const float* queries, std::int64_t count, const TransferRequest& request,
                          const TransferBuffers& buffers) const;

  // How many queries are taken at once.
  static std::int64_t queries_at_once(std::int64_t memory_bytes, std::int64_t dim, std::int64_t k);

 private:
  Table table_;
  SearchFunction search_;
  Options options_;
};

}  // namespace gcfast
