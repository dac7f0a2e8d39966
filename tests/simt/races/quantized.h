// A packed weight for race cases.
#pragma once
#include <random>
#include <vector>

#include "llmcore/quantized_linear.h"

namespace races {

using namespace llmcore;

constexpr int64_t kN = 37;

// Any bytes, but for the float16 scales, which are to be finite: the second byte of each is that of a small number; and
// for sc and mn of formats with minima, which have 6 bits.
inline std::vector<uint8_t> packed_weight(QuantFormat format, int64_t k) {
  const QuantLayout& f = kQuantLayouts[static_cast<int>(format)];
  const int64_t panel = quant_panel_bytes(f, k), halves = f.offset ? 32 : 64, step = halves + (f.nested ? 256 : 0);
  std::vector<uint8_t> bytes((kN + kQuantPanel - 1) / kQuantPanel * panel);
  std::mt19937 make(1);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(make());
  for (size_t at = 0; at < bytes.size(); at += panel)
    for (int64_t i = 0; i < k / f.block * step; ++i) {
      if (i % step < halves && i % 2 == 1) bytes[at + i] &= 0xbb;
      if (i % step >= halves && !f.offset) bytes[at + i] &= 63;
    }
  return bytes;
}

}  // namespace races
