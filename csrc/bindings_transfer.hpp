#pragma once

#include <pybind11/pybind11.h>

namespace gcfast {

// Adds TransferEngine.
void register_transfer(pybind11::module_& module);

}  // namespace gcfast
