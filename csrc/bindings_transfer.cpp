// What Python sees of the transfer engine: checks, conversion and the interpreter lock.
#include "bindings_transfer.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
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

constexpr std::chrono::milliseconds kSignalCheck{50};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename T>
const T* data(const py::array& array, const char* name, std::vector<py::ssize_t> shape) {
  require(array.dtype().is(py::dtype::of<T>()) || array.dtype().equal(py::dtype::of<T>()),
          std::string("`") + name + "` of a shard has another dtype");
  require((array.flags() & py::array::c_style) != 0 &&
              std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) == shape,
          std::string("`") + name + "` of a shard has another shape or is not contiguous");
  return static_cast<const T*>(array.data());
}

const void* values(const py::array& array, const char* name, std::vector<py::ssize_t> shape,
                   bool* half) {
  *half = array.itemsize() == 2;
  if (!*half) return data<float>(array, name, std::move(shape));
  require(array.dtype().kind() == 'f', std::string("`") + name + "` of a shard has another dtype");
  require((array.flags() & py::array::c_style) != 0 &&
              std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) == shape,
          std::string("`") + name + "` of a shard has another shape or is not contiguous");
  return array.data();
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
  return py::make_tuple(
      owned(result.neighbors, {B, K}), owned(result.distances, {B, K}),
      owned(result.labels, {B, K}), owned(result.rows, {B, 1}),
      rows_of(result.channels, result.own_channels, outputs.channels, {B, W}),
      rows_of(result.weights, result.own_weights, outputs.weights, {B, W}),
      rows_of(result.offsets, result.own_offsets, outputs.offsets, {B}));
}

class PyTicket {
 public:
  PyTicket(std::shared_ptr<Ticket> ticket, Outputs outputs, py::object engine)
      : ticket_(std::move(ticket)),
        outputs_(std::move(outputs)),
        engine_(std::move(engine)),
        process_(getpid()) {}

  bool done() const {
    check_process();
    return ticket_->wait_for(std::chrono::milliseconds{0});
  }

  py::tuple wait() {
    check_process();
    for (bool ended = false; !ended;) {
      {
        const py::gil_scoped_release unlocked;
        ended = ticket_->wait_for(kSignalCheck);
      }
      if (!ended && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    // Making the arrays may run any Python, and so let another thread that waits come here too.
    std::unique_lock<std::mutex> turn(taking_, std::defer_lock);
    {
      const py::gil_scoped_release unlocked;
      turn.lock();
    }
    if (!arrays_) arrays_ = arrays_of(*ticket_->result(), outputs_);
    return *arrays_;
  }

 private:
  void check_process() const {
    if (getpid() != process_)
      throw UsedAfterFork("the ticket belongs to process " + std::to_string(process_) +
                          " and cannot be used in process " + std::to_string(getpid()) +
                          ", forked from it");
  }

  std::shared_ptr<Ticket> ticket_;
  Outputs outputs_;
  py::object engine_;  // whose end would fail what is waited for
  std::mutex taking_;
  std::optional<py::tuple> arrays_;
  const pid_t process_;
};

class PyEngine {
 public:
  PyEngine(const py::object& index, const py::list& shards, int64_t dim, int64_t width, int threads,
           int64_t memory_bytes, bool exclusive, const py::object& on_worker_start)
      : shards_(shards) {
    require(threads >= 1, "`threads` must be at least 1");
    require(memory_bytes >= 1, "`memory_bytes` must be at least 1");
    require(dim >= 1 && width >= 1, "`dim` and `width` must be at least 1");
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
    TransferEngine::Options options{threads, memory_bytes, {}};
    if (!on_worker_start.is_none())
      options.on_worker_start = [start = hold(on_worker_start)] {
        const py::gil_scoped_acquire locked;
        python([&] { (*start)(); });
      };
    engine_ = std::make_unique<TransferEngine>(std::move(table), search_function(index, exclusive),
                                               std::move(options));
    alive().insert(this);
  }

  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  ~PyEngine() {
    alive().erase(this);
    const py::gil_scoped_release unlocked;  // the worker may need it to come to its end
    engine_.reset();
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

  // Not a method, because the ticket holds the Python object. (py::keep_alive<0, 1> would be
  // shorter; in pybind11 3.1.0 it crashes when the arguments are of other types.)
  static std::unique_ptr<PyTicket> submit(const py::object& self, const Queries& queries, int64_t k,
                                          double temperature,
                                          const std::optional<py::tuple>& buffers,
                                          const py::object& ready) {
    auto& engine = self.cast<PyEngine&>();
    const TransferRequest request = engine.checked(queries, k, temperature, true);
    Outputs outputs = engine.outputs_of(buffers, queries.shape(0), k);
    const Held owner = hold(py::make_tuple(queries, ready, buffers ? *buffers : py::tuple()));
    const float* const data = queries.data();
    TransferJob job{{}, queries.shape(0), request, outputs.pointers(), owner};
    if (ready.is_none())
      job.queries = [data] { return data; };
    else
      job.queries = [data, wait = ready.ptr()] {  // the job's owner holds it
        const py::gil_scoped_acquire locked;
        python([&] { py::reinterpret_borrow<py::object>(wait)(); });
        return data;
      };
    std::shared_ptr<Ticket> ticket;
    {
      const py::gil_scoped_release unlocked;
      ticket = engine.engine_->submit(std::move(job));
    }
    return std::make_unique<PyTicket>(std::move(ticket), std::move(outputs), self);
  }

  void close() {
    const py::gil_scoped_release unlocked;
    engine_->close();
  }

  // Before the interpreter ends: a worker that comes back from an index afterwards could not.
  static void close_all() {
    for (PyEngine* engine : std::set<PyEngine*>(alive())) {
      try {
        if (alive().count(engine) != 0) engine->close();
      } catch (const UsedAfterFork&) {
        // Its threads are another process's.
      }
    }
  }

 private:
  // Guarded by the interpreter lock.
  static std::set<PyEngine*>& alive() {
    static auto* const engines = new std::set<PyEngine*>;
    return *engines;
  }

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

void set_error(const char* name, const char* text) {
  py::set_error(py::module_::import("gcfast.errors").attr(name), text);
}

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const PythonError& error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.value->ptr())), error.value->ptr());
  } catch (const UsedAfterFork& error) {
    set_error("GcfastError", error.what());
  } catch (const EngineClosed& error) {
    set_error("GcfastError", error.what());
  }
}

}  // namespace

void register_transfer(py::module_& module) {
  py::register_local_exception_translator(translate);
  py::class_<PyTicket>(module, "Ticket", "A batch under way; see TransferEngine.submit.")
      .def("done", &PyTicket::done, "Whether wait() would return at once.")
      .def("wait", &PyTicket::wait,
           "What TransferEngine.transfer returns, or its exception; each time.");
  py::class_<PyEngine>(
      module, "TransferEngine",
      "Search through a FAISS index and gather of the rows it finds; see gcfast.explain.transfer.\n\n"
      "shards: [(embeddings, channels, weights, offsets, labels)], rows in order. exclusive: one\n"
      "thread in the index at a time. memory_bytes bounds what is held at once beyond the result.")
      .def(py::init<const py::object&, const py::list&, int64_t, int64_t, int, int64_t, bool,
                    const py::object&>(),
           py::arg("index"), py::arg("shards"), py::kw_only(), py::arg("dim"), py::arg("width"),
           py::arg("threads"), py::arg("memory_bytes"), py::arg("exclusive") = false,
           py::arg("on_worker_start") = py::none())
      .def("transfer", &PyEngine::transfer, py::arg("queries").noconvert(), py::kw_only(),
           py::arg("k"), py::arg("temperature") = 1.0, py::arg("buffers") = py::none(),
           "(neighbors [B,K], distances [B,K], labels [B,K], rows [B,1], channels [B,W],\n"
           "weights [B,W], offsets [B]).")
      .def("search", &PyEngine::search, py::arg("queries").noconvert(), py::kw_only(), py::arg("k"),
           "(distances [B,K], neighbors [B,K]).")
      .def("submit", &PyEngine::submit, py::arg("queries").noconvert(), py::kw_only(), py::arg("k"),
           py::arg("temperature") = 1.0, py::arg("buffers") = py::none(),
           py::arg("ready") = py::none(),
           "A Ticket. `queries` must not be written to before it is done; `ready` is called by\n"
           "the worker before it reads them.")
      .def("close", &PyEngine::close,
           "Ends the batch under way, fails those behind it, refuses others.");
  py::module_::import("atexit").attr("register")(py::cpp_function(&PyEngine::close_all));
}

}  // namespace gcfast
