#pragma once
#include <pybind11/pybind11.h>

namespace llmcore {
void add_gguf(pybind11::module_& m);
}
