#include "case.h"
#include "quantized.h"

using namespace llmcore;
using namespace races;

RACE_CASE(quantized_linear) {
  for (int format = 0; format < kQuantFormats; ++format)
    for (DType dtype : kFloats)
      for (int64_t rows : {1, 11}) {
        const int64_t k = dtype == DType::f32 && format == 0 ? 2304 : 512;  // also more than a chunk
        const std::vector<uint8_t> weight = packed_weight(static_cast<QuantFormat>(format), k);
        const Tensor x = random_normal(dtype, rows * k), bias = random_normal(dtype, kN);
        Tensor y(dtype, rows * kN);
        const QuantizedLinearParams p{
            dtype, static_cast<QuantFormat>(format), rows, kN, k, x.data(), k, weight.data(), bias.data(), y.data(),
            kN};
        check(kQuantLayouts[format].name, BOTH(quantized_linear), p, {{"y", y}});
      }
}
