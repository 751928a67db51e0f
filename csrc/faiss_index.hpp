// The index of the transfer engine, which is Python's: how it is entered from any thread, and how
// its exceptions travel.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "transfer_engine.hpp"

namespace gcfast {

// A Python object that any thread may let go of.
using Held = std::shared_ptr<pybind11::object>;

inline Held hold(pybind11::object object) {
  return {new pybind11::object(std::move(object)), [](pybind11::object* held) {
            const pybind11::gil_scoped_acquire locked;
            delete held;
          }};
}

// A Python exception that may be raised again on other threads, each time that it is asked for.
struct PythonError : std::runtime_error {
  PythonError(const std::string& text, Held raised) : std::runtime_error(text), value(raised) {}
  Held value;
};

// Calls Python; the interpreter lock is held.
template <typename Call>
auto python(const Call& call) {
  try {
    return call();
  } catch (pybind11::error_already_set& error) {
    pybind11::object value = error.value();
    if (error.trace()) value.attr("__traceback__") = error.trace();
    throw PythonError(error.what(), hold(std::move(value)));
  }
}

// The search_c of a FAISS index, or of what stands in its place; with `exclusive` one thread at a
// time is inside, whichever engine it comes from.
SearchFunction search_function(const pybind11::object& index, bool exclusive);

}  // namespace gcfast
