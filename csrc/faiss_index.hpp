// The index of the transfer engine, which is a Python object, as a function for C++.
#pragma once

#include <pybind11/pybind11.h>

#include "transfer_engine.hpp"

namespace gcfast {

// The search_c of a FAISS index, or of what stands in for one. It may be called without the
// interpreter lock, which must be held where the function is destroyed. Exceptions are pybind11's.
SearchFunction search_function(const pybind11::object& index);

}  // namespace gcfast
