// What Python sees of the transfer engine: checks, conversion and the interpreter lock.
#include "bindings_transfer.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "faiss_index.hpp"
#include "transfer_engine.hpp"

namespace py = pybind11;

namespace gcfast {
namespace {

using std::int64_t;
using Queries = py::array_t<float, py::array::c_style>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

const void* checked_data(const py::array& array, const char* name, const py::dtype& dtype,
                         const std::vector<py::ssize_t>& shape) {
  require(array.dtype().equal(dtype), std::string("`") + name + "` of a shard has another dtype");
  require((array.flags() & py::array::c_style) != 0 &&
              std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) == shape,
          std::string("`") + name + "` of a shard has another shape or is not contiguous");
  return array.data();
}

template <typename T>
const T* data(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
  return static_cast<const T*>(checked_data(array, name, py::dtype::of<T>(), shape));
}

// float32 or float16
const void* values(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape,
                   bool* half) {
  *half = array.itemsize() == 2;
  return checked_data(array, name, *half ? py::dtype("e") : py::dtype::of<float>(), shape);
}

Shard shard_of(const py::sequence& given, int64_t dim, int64_t width) {
  require(given.size() == 5, "a shard must be (embeddings, channels, weights, offsets, labels)");
  const auto array = [&](size_t i) { return given[i].cast<py::array>(); };
  const py::ssize_t n = array(0).shape(0);
  Shard shard{};
  shard.rows = n;
  shard.embeddings = values(array(0), "embeddings", {n, dim}, &shard.half_embeddings);
  shard.channels = data<int64_t>(array(1), "channels", {n, width});
  shard.weights = values(array(2), "weights", {n, width}, &shard.half_weights);
  shard.offsets = data<float>(array(3), "offsets", {n});
  shard.labels = data<int64_t>(array(4), "labels", {n});
  return shard;
}

struct Outputs {
  std::optional<py::array> channels, weights, offsets;

  TransferBuffers pointers() const {
    if (!channels) return {};
    return {static_cast<int64_t*>(const_cast<void*>(channels->data())),
            static_cast<float*>(const_cast<void*>(weights->data())),
            static_cast<float*>(const_cast<void*>(offsets->data()))};
  }
};

template <typename T>
py::array owned(std::unique_ptr<T[]>& values, std::vector<py::ssize_t> shape) {
  T* const pointer = values.release();
  const py::capsule owner(pointer, [](void* held) { delete[] static_cast<T*>(held); });
  return py::array_t<T>(std::move(shape), pointer, owner);
}

template <typename T>
py::array rows_of(T* pointer, std::unique_ptr<T[]>& own, const std::optional<py::array>& buffer,
                  std::vector<py::ssize_t> shape) {
  if (own) return owned(own, std::move(shape));
  return py::array_t<T>(std::move(shape), pointer, *buffer);
}

py::tuple arrays_of(TransferResult& result, const Outputs& outputs) {
  const py::ssize_t B = result.count, K = result.k, W = result.width;
  return py::make_tuple(owned(result.neighbors, {B, K}), owned(result.distances, {B, K}),
                        owned(result.labels, {B, K}), owned(result.rows, {B, 1}),
                        rows_of(result.channels, result.own_channels, outputs.channels, {B, W}),
                        rows_of(result.weights, result.own_weights, outputs.weights, {B, W}),
                        rows_of(result.offsets, result.own_offsets, outputs.offsets, {B}));
}

class PyEngine {
 public:
  PyEngine(const py::object& index, const py::list& shards, int64_t dim, int64_t width, int threads,
           int64_t memory_bytes)
      : shards_(shards) {
    require(threads >= 1, "`threads` must be at least 1");
    require(memory_bytes >= 1, "`memory_bytes` must be at least 1");
    require(dim >= 1 && width >= 0, "`dim` must be at least 1 and `width` at least 0");
    std::vector<Shard> made;
    for (const auto& shard : shards)
      made.push_back(shard_of(py::cast<py::sequence>(shard), dim, width));
    Table table(std::move(made), dim, width);
    require(index.attr("d").cast<int64_t>() == dim,
            "`index` must have the dimension of the database, " + std::to_string(dim) + ", got " +
                std::to_string(index.attr("d").cast<int64_t>()));
    require(index.attr("ntotal").cast<int64_t>() == table.rows(),
            "`index` must hold the database's " + std::to_string(table.rows()) + " rows, got " +
                std::to_string(index.attr("ntotal").cast<int64_t>()));
    engine_ = std::make_unique<TransferEngine>(std::move(table), search_function(index),
                                               TransferEngine::Options{threads, memory_bytes});
  }

  py::tuple transfer(const Queries& queries, int64_t k, double temperature,
                     const std::optional<py::tuple>& buffers) const {
    const TransferRequest request = checked(queries, k, temperature, true);
    const Outputs outputs = outputs_of(buffers, queries.shape(0), k);
    TransferResult result = run(queries, request, outputs);
    return arrays_of(result, outputs);
  }

  py::tuple search(const Queries& queries, int64_t k) const {
    TransferResult result = run(queries, checked(queries, k, 1.0, false), Outputs{});
    const py::ssize_t B = result.count;
    return py::make_tuple(owned(result.distances, {B, k}), owned(result.neighbors, {B, k}));
  }

 private:
  TransferRequest checked(const Queries& queries, int64_t k, double temperature,
                          bool gather) const {
    require(queries.ndim() == 2 && queries.shape(1) == engine_->table().dim(),
            "`queries` must have shape [B, D] with D = " + std::to_string(engine_->table().dim()));
    require(k >= 1, "`k` must be at least 1");
    require(temperature >= 0, "`temperature` must be at least 0");
    return {k, temperature, gather};
  }

  Outputs outputs_of(const std::optional<py::tuple>& buffers, int64_t count, int64_t k) const {
    if (!buffers) return {};
    require(buffers->size() == 3, "`buffers` must be (channels, weights, offsets)");
    const int64_t size = count * k * engine_->table().width();
    const auto array = [&](size_t i, char kind, py::ssize_t itemsize, int64_t least) {
      const auto given = (*buffers)[i].cast<py::array>();
      require(given.ndim() == 1 && given.size() >= least && given.writeable() &&
                  given.dtype().kind() == kind && given.itemsize() == itemsize &&
                  (given.flags() & py::array::c_style) != 0,
              "`buffers` must be int64 and float32 of at least B*K*M and float32 of at least B "
              "elements, contiguous and writable");
      return given;
    };
    return {array(0, 'i', 8, size), array(1, 'f', 4, size), array(2, 'f', 4, count)};
  }

  TransferResult run(const Queries& queries, const TransferRequest& request,
                     const Outputs& outputs) const {
    const float* const data = queries.data();
    const int64_t count = queries.shape(0);
    // The arguments hold the arrays for the whole call; the index takes the lock back to be
    // entered.
    const py::gil_scoped_release unlocked;
    return engine_->transfer(data, count, request, outputs.pointers());
  }

  py::list shards_;  // keeps what the table points to
  std::unique_ptr<TransferEngine> engine_;
};

}  // namespace

void register_transfer(py::module_& module) {
  py::class_<PyEngine>(
      module, "TransferEngine",
      "Search through a FAISS index and gather of the rows it finds; see "
      "gcfast.search.transfer.\n\n"
      "shards: [(embeddings, channels, weights, offsets, labels)], rows in order. memory_bytes\n"
      "bounds what is held at once beyond the result.\n"
      "Calls release the interpreter lock; the index takes it back to be entered.")
      .def(py::init<const py::object&, const py::list&, int64_t, int64_t, int, int64_t>(),
           py::arg("index"), py::arg("shards"), py::kw_only(), py::arg("dim"), py::arg("width"),
           py::arg("threads"), py::arg("memory_bytes"))
      .def("transfer", &PyEngine::transfer, py::arg("queries").noconvert(), py::kw_only(),
           py::arg("k"), py::arg("temperature") = 1.0, py::arg("buffers") = py::none(),
           "(neighbors [B,K], distances [B,K], labels [B,K], rows [B,1], channels [B,W],\n"
           "weights [B,W], offsets [B]).")
      .def("search", &PyEngine::search, py::arg("queries").noconvert(), py::kw_only(), py::arg("k"),
           "(distances [B,K], neighbors [B,K]).");
}

}  // namespace gcfast
