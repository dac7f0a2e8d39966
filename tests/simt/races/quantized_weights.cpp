#include "case.h"
#include "quantized.h"

using namespace llmcore;
using namespace races;

RACE_CASE(quantized_embedding) {
  const std::vector<int64_t> ids = {36, 0, 15, 16, 0};
  const int64_t k = 512, count = static_cast<int64_t>(ids.size());
  for (int format = 0; format < kQuantFormats; ++format)
    for (DType dtype : kFloats) {
      const std::vector<uint8_t> weight = packed_weight(static_cast<QuantFormat>(format), k);
      Tensor y(dtype, count * k);
      const QuantizedEmbeddingParams p{
          dtype, static_cast<QuantFormat>(format), count, k, kN, ids.data(), weight.data(), y.data()};
      check(kQuantLayouts[format].name, BOTH(quantized_embedding), p, {{"y", y}});
    }
}
