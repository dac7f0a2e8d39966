#pragma once
#include <pybind11/pybind11.h>

namespace llmcore {
void add_decoder(pybind11::module_& m);
}
