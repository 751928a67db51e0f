#include "faiss_index.hpp"

#include <cstdint>
#include <memory>

namespace py = pybind11;

namespace gcfast {
namespace {

using std::int64_t;

// FAISS's Python object for a pointer. It holds just the address, so the last object is reused: in
// a loop over batches of one size, allocators return the same addresses. Guarded by the interpreter
// lock.
class Pointer {
 public:
  explicit Pointer(const char* cast) : cast_(py::module_::import("faiss").attr(cast)) {}

  const py::object& operator()(const void* address) {
    if (address != last_ || !object_) {
      object_ = cast_(reinterpret_cast<std::uintptr_t>(address));
      last_ = address;
    }
    return object_;
  }

 private:
  py::object cast_, object_;
  const void* last_ = nullptr;
};

struct FaissIndex {
  explicit FaissIndex(const py::object& object) : search_c(object.attr("search_c")) {}

  void search(int64_t n, const float* from, int64_t k, float* to, int64_t* found) {
    // Copies, because another thread may ask for other pointers while FAISS searches.
    const py::object x = queries(from), D = distances(to), I = ids(found);
    search_c(n, x, k, D, I);
  }

  py::object search_c;  // a bound method: it holds the index
  Pointer queries{"cast_integer_to_float_ptr"}, distances{"cast_integer_to_float_ptr"},
      ids{"cast_integer_to_idx_t_ptr"};
};

}  // namespace

// The interpreter lock is taken to enter the index; FAISS releases it while it searches.
SearchFunction search_function(const py::object& object) {
  const auto index = std::make_shared<FaissIndex>(object);
  return [index](int64_t n, const float* queries, int64_t k, float* distances, int64_t* found) {
    const py::gil_scoped_acquire locked;
    index->search(n, queries, k, distances, found);
  };
}

}  // namespace gcfast
