// C++ classes that Python uses as they are.
#pragma once
#include <pybind11/pybind11.h>

namespace llmcore {
void add_block_allocator(pybind11::module_& m);
void add_decoder(pybind11::module_& m);
}  // namespace llmcore
