// Panels of packed quantised weights (llmcore/reference/quantized.py): where their numbers lie, and vectors of them.
#pragma once
#include "llmcore/quantized_linear.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

constexpr int kGroups = 8;  // of 4 adjacent weights, in a block of 32

template <QuantFormat Which>
struct Quant : QuantFacts<Which> {
  static constexpr QuantLayout kLayout = kQuantLayouts[static_cast<int>(Which)];
};

// Where the float16 scales of block b start; and, of nested formats, its 16 bytes of sc, then 16 of mn or, of q6_k, of
// the second sc.
template <class F>
LLMCORE_INLINE const uint8_t* half_scales(const uint8_t* panel, int64_t b) {
  return panel + (F::kNested ? b / 8 * F::kNestedBytes : b * F::kScaleBytes);
}
template <class F>
LLMCORE_INLINE const uint8_t* byte_scales(const uint8_t* panel, int64_t b) {
  return half_scales<F>(panel, b) + F::kScaleBytes + b % 8 * 32;
}

// The scales of kLanes rows, in block b.
struct PanelScales {
  vf scale[2];  // the second: of weights 16 ... 31, where these have their own
  vf addend;
};

LLMCORE_INLINE vf load_halves(const uint8_t* p, int row) {
  return load(reinterpret_cast<const f16*>(static_cast<const void*>(p)) + row);
}
LLMCORE_INLINE vf load_bytes(const uint8_t* p, int row) {
  return load(reinterpret_cast<const int8_t*>(p) + row);  // sc and mn have 6 bits, or a sign
}

template <class F>
LLMCORE_INLINE PanelScales load_scales(const uint8_t* panel, int64_t b, int row) {
  const uint8_t* halves = half_scales<F>(panel, b);
  PanelScales s = {{load_halves(halves, row), zero()}, zero()};
  if constexpr (F::kHasMin) s.addend = load_halves(halves + 32, row);
  if constexpr (F::kNested) {
    const uint8_t* bytes = byte_scales<F>(panel, b);
    const vf second = load_bytes(bytes + 16, row);
    if constexpr (F::kHalves) s.scale[1] = s.scale[0] * second;
    if constexpr (F::kHasMin) s.addend = -(s.addend * second);
    s.scale[0] = s.scale[0] * load_bytes(bytes, row);
  }
  return s;
}

LLMCORE_INLINE vu load_line(const uint8_t* p) {
  vu v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
// Bits [from, from + count) of each byte, moved to bit `to`.
template <int From, int Count, int To>
LLMCORE_INLINE vu move_bits(vu v) {
  constexpr uint32_t kMask = ((1u << Count) - 1) << To;
  if constexpr (From > To) return (v >> (From - To)) & (kMask * 0x01010101u);
  return (v << (To - From)) & (kMask * 0x01010101u);
}

// The groups of a block as bytes: w[g] holds, of each of kLanes rows, 4 adjacent q. `lines` points to the first of
// these rows in the first line.
template <class F, int Group>
LLMCORE_INLINE vu load_group(const uint8_t* lines) {
  if constexpr (F::kBits == 8) {
    return load_line(lines + Group * 64);
  } else {
    const vu low = move_bits<Group / 4 * 4, 4, 0>(load_line(lines + Group % 4 * 64));
    if constexpr (F::kBits == 5) return low | move_bits<Group, 1, 4>(load_line(lines + 256));
    if constexpr (F::kBits == 6) return low | move_bits<Group % 4 * 2, 2, 4>(load_line(lines + 256 + Group / 4 * 64));
    return low;
  }
}
template <class F>
LLMCORE_INLINE void load_groups(const uint8_t* lines, vu (&w)[kGroups]) {
  w[0] = load_group<F, 0>(lines), w[1] = load_group<F, 1>(lines), w[2] = load_group<F, 2>(lines);
  w[3] = load_group<F, 3>(lines), w[4] = load_group<F, 4>(lines), w[5] = load_group<F, 5>(lines);
  w[6] = load_group<F, 6>(lines), w[7] = load_group<F, 7>(lines);
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
