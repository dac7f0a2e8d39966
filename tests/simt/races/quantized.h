// A packed weight for race cases.
#pragma once
#include <random>
#include <vector>

#include "llmcore/quantized_linear.h"

namespace races {

using namespace llmcore;

constexpr int64_t kN = 37;

// Any bytes, but for the float16 scales, which are to be finite: the second byte of each is that of a small number.
inline std::vector<uint8_t> packed_weight(QuantFormat format, int64_t k) {
  const QuantLayout& f = kQuantLayouts[static_cast<int>(format)];
  const int64_t panel = quant_panel_bytes(f, k), halves = f.offset ? 32 : 64;
  std::vector<uint8_t> bytes((kN + kQuantPanel - 1) / kQuantPanel * panel);
  std::mt19937 make(1);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(make());
  for (size_t at = 0; at < bytes.size(); at += panel)
    for (int64_t i = 0; i < k / f.block; ++i)
      for (int64_t h = 1; h < halves; h += 2) bytes[at + i * (f.nested ? halves + 256 : halves) + h] &= 0xbb;
  return bytes;
}

}  // namespace races
