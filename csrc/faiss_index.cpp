#include "faiss_index.hpp"

#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace py = pybind11;

namespace gcfast {
namespace {

using std::int64_t;

// The locks of indices that one thread may enter at a time, by the index's address; unused ones are
// dropped when the next one is asked for. Guarded by the interpreter lock.
std::shared_ptr<std::mutex> lock_of(std::uintptr_t index) {
  static auto* const locks = new std::unordered_map<std::uintptr_t, std::weak_ptr<std::mutex>>;
  for (auto at = locks->begin(); at != locks->end();)
    at = at->second.expired() ? locks->erase(at) : std::next(at);
  auto lock = (*locks)[index].lock();
  if (lock == nullptr) (*locks)[index] = lock = std::make_shared<std::mutex>();
  return lock;
}

// The C++ index's address where there is one, so that two Python objects of one index share a lock.
std::uintptr_t address_of(const py::object& index) {
  if (py::hasattr(index, "this")) return py::int_(index.attr("this")).cast<std::uintptr_t>();
  return reinterpret_cast<std::uintptr_t>(index.ptr());
}

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
SearchFunction search_function(const py::object& object, bool exclusive) {
  const auto index = std::make_shared<FaissIndex>(object);
  const auto lock = exclusive ? lock_of(address_of(object)) : nullptr;
  return [index, lock](int64_t n, const float* queries, int64_t k, float* distances,
                       int64_t* found) {
    // Before the interpreter lock, which the thread inside the index needs to leave it.
    const auto turn = lock ? std::unique_lock<std::mutex>(*lock) : std::unique_lock<std::mutex>();
    const py::gil_scoped_acquire locked;
    index->search(n, queries, k, distances, found);
  };
}

}  // namespace gcfast
