#pragma once
#include <string>

#include "llmcore/quantized_linear.h"

namespace llmcore {
QuantFormat quant_format(const std::string& name, const char* op);  // an error that lists the formats for another name
}
