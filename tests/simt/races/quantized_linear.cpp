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

RACE_CASE(quantized_grouped_linear) {
  const std::vector<int32_t> offsets = {0, 0, 1, 12, 12}, token_of = {3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 4, 5};
  const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back(), tokens = 6;
  for (int format = 0; format < kQuantFormats; ++format)
    for (DType dtype : kFloats) {
      const int64_t k = dtype == DType::f32 && format == 0 ? 2304 : 512;
      const std::vector<uint8_t> one = packed_weight(static_cast<QuantFormat>(format), k);
      std::vector<uint8_t> weight;
      for (int64_t e = 0; e < experts; ++e) weight.insert(weight.end(), one.begin(), one.end());
      const Tensor x = random_normal(dtype, tokens * k), bias = random_normal(dtype, experts * kN);
      Tensor y(dtype, rows * kN);
      const QuantizedGroupedLinearParams p{
          {dtype, static_cast<QuantFormat>(format), rows, kN, k, x.data(), k, weight.data(), bias.data(), y.data(), kN},
          experts,
          offsets.data(),
          token_of.data()};
      check(kQuantLayouts[format].name, BOTH(quantized_grouped_linear), p, {{"y", y}});
    }
}
