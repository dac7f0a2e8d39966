// Quantised weights between a file's blocks and panels, and back to numbers, a row at a time.
#include "quantized_panel.h"
#include "scratch.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// A row's weights and scales of one block of a file.
struct FileBlock {
  uint8_t q[256];
  uint8_t d[2], m[2];     // float16, as they lie
  uint8_t sc[16], mn[8];  // of nested formats
};

// 4 bits each: the low halves of `chunk` bytes, then the high ones, chunk after chunk.
LLMCORE_INLINE void read_low_bits(const uint8_t* from, int64_t bytes, int64_t chunk, uint8_t* q) {
  for (int64_t c = 0; c < bytes; c += chunk)
    for (int64_t i = 0; i < chunk; ++i) {
      q[2 * c + i] = from[c + i] & 15;
      q[2 * c + chunk + i] = from[c + i] >> 4;
    }
}

// 12 bytes of 6-bit numbers: the first four of sc and of mn in the low bits of bytes 0 ... 7, whose two highest bits
// are those of the last four, whose low halves are in bytes 8 ... 11.
LLMCORE_INLINE void read_scales_of_k(const uint8_t* from, uint8_t* sc, uint8_t* mn) {
  for (int i = 0; i < 4; ++i) {
    sc[i] = from[i] & 63;
    mn[i] = from[4 + i] & 63;
    sc[4 + i] = (from[8 + i] & 15) | (from[i] >> 6 << 4);
    mn[4 + i] = (from[8 + i] >> 4) | (from[4 + i] >> 6 << 4);
  }
}

template <class F>
void read_block(const uint8_t* from, FileBlock& to) {
  if constexpr (F::kHalves) {
    read_low_bits(from, 128, 64, to.q);
    for (int i = 0; i < 256; ++i) to.q[i] |= ((from[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3) << 4;
    __builtin_memcpy(to.sc, from + 192, 16);
    __builtin_memcpy(to.d, from + 208, 2);
    return;
  }
  __builtin_memcpy(to.d, from, 2), from += 2;
  if (F::kHasMin) __builtin_memcpy(to.m, from, 2), from += 2;
  if (F::kNested) read_scales_of_k(from, to.sc, to.mn), from += 12;
  if (F::kBits == 8) {
    for (int i = 0; i < 32; ++i) to.q[i] = from[i] ^ 0x80;
    return;
  }
  constexpr int64_t kWeights = F::kLayout.block, kHigh = F::kBits == 5 ? kWeights / 8 : 0;
  read_low_bits(from + kHigh, kWeights / 2, F::kNested ? 32 : 16, to.q);
  if (F::kBits == 5)
    for (int64_t i = 0; i < kWeights; ++i)
      to.q[i] |= (F::kNested ? from[i % 32] >> (i / 32) & 1 : from[i / 8] >> (i % 8) & 1) << 4;
}

// 32 weights of one row into the lines of a panel: q[0 ... 31] of row r.
template <class F>
LLMCORE_INLINE void write_lines(const uint8_t* q, int64_t r, uint8_t* lines) {
  uint8_t* to = lines + r * 4;
  if constexpr (F::kBits == 8) {
    for (int g = 0; g < kGroups; ++g) __builtin_memcpy(to + g * 64, q + g * 4, 4);
    return;
  }
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 4; ++i) to[g * 64 + i] = (q[g * 4 + i] & 15) | (q[16 + g * 4 + i] << 4 & 0xf0);
  for (int line = 0; line < F::kBits - 4; ++line)
    for (int i = 0; i < 4; ++i) {
      constexpr int kParts = F::kBits == 5 ? 8 : 4, kStep = 8 / kParts;
      uint8_t byte = 0;
      for (int g = 0; g < kParts; ++g) byte |= q[(line * kParts + g) * 4 + i] >> 4 << (g * kStep);
      to[256 + line * 64 + i] = byte;
    }
}

// One block of 4-bit weights: a file's bytes are those of the lines already.
LLMCORE_INLINE void copy_lines(const uint8_t* from, int64_t r, uint8_t* lines) {
  for (int g = 0; g < 4; ++g) __builtin_memcpy(lines + g * 64 + r * 4, from + g * 4, 4);
}

template <class F>
void pack_panel(const PackQuantizedParams& p, int64_t index) {
  constexpr int64_t kWeights = F::kLayout.block;
  if (p.k == 0) return;
  const int64_t row_bytes = p.k / kWeights * F::kLayout.block_bytes, bytes = quant_panel_bytes(F::kLayout, p.k);
  uint8_t* panel = p.packed + index * bytes;
  __builtin_memset(panel, 0, bytes);  // rows beyond n, and what pads the scales
  uint8_t* lines = panel + quant_scale_bytes(F::kLayout, p.k);
  const int64_t first = index * kQuantPanel, rows = p.n - first < kQuantPanel ? p.n - first : kQuantPanel;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < p.k / kWeights; ++b) {
      const uint8_t* from = p.blocks + (first + r) * row_bytes + b * F::kLayout.block_bytes;
      const int64_t b32 = b * kWeights / kQuantBlock;
      uint8_t* scales = panel + (half_scales<F>(panel, b32) - panel);
      if constexpr (F::kBits == 4 && !F::kNested) {
        __builtin_memcpy(scales + r * 2, from, 2);
        if constexpr (F::kHasMin) __builtin_memcpy(scales + 32 + r * 2, from + 2, 2);
        copy_lines(from + (F::kHasMin ? 4 : 2), r, lines + b32 * F::kBlockBytes);
        continue;
      }
      FileBlock block;
      read_block<F>(from, block);
      for (int64_t i = 0; i < kWeights / kQuantBlock; ++i)
        write_lines<F>(block.q + i * kQuantBlock, r, lines + (b32 + i) * F::kBlockBytes);
      __builtin_memcpy(scales + r * 2, block.d, 2);
      if constexpr (F::kHasMin) __builtin_memcpy(scales + 32 + r * 2, block.m, 2);
      if constexpr (F::kNested)
        for (int i = 0; i < 8; ++i) {
          uint8_t* nested = scales + F::kScaleBytes + i * 32 + r;
          nested[0] = F::kHalves ? block.sc[2 * i] : block.sc[i];
          nested[16] = F::kHalves ? block.sc[2 * i + 1] : block.mn[i];
        }
    }
}

template <class F>
void pack(const PackQuantizedParams& p, const Parallel& par) {
  const int64_t panels = (p.n + kQuantPanel - 1) / kQuantPanel;
  parallel_ranges(par, panels, row_grain(p.k * kQuantPanel + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_panel<F>(p, i);
  });
  // Products read huge pages a little faster. Asked for now, they are made in the background; asked for before, each
  // first touch would wait for 2 MB of memory in one piece, for milliseconds where memory is fragmented.
  prefer_huge_pages(p.packed, panels * quant_panel_bytes(F::kLayout, p.k));
}

// q of weight i (0 ... 31) of a block, of the panel's row r.
template <class F>
LLMCORE_INLINE int quant_of(const uint8_t* lines, int64_t r, int i) {
  const int g = i / 4;
  const uint8_t* at = lines + r * 4 + i % 4;
  if constexpr (F::kBits == 8) return at[g * 64];
  int q = at[g % 4 * 64] >> (g / 4 * 4) & 15;
  if constexpr (F::kBits == 5) q |= (at[256] >> g & 1) << 4;
  if constexpr (F::kBits == 6) q |= (at[256 + g / 4 * 64] >> (g % 4 * 2) & 3) << 4;
  return q;
}

LLMCORE_INLINE float half_at(const uint8_t* p) {
  f16 half;
  __builtin_memcpy(&half, p, sizeof(half));
  return to_float(half);
}

template <class F, class T>
void read_row(const uint8_t* weight, int64_t k, int64_t row, T* y) {
  const uint8_t* panel = weight + row / kQuantPanel * quant_panel_bytes(F::kLayout, k);
  const uint8_t* lines = panel + quant_scale_bytes(F::kLayout, k);
  const int64_t r = row % kQuantPanel;
  for (int64_t b = 0; b < k / kQuantBlock; ++b, lines += F::kBlockBytes, y += kQuantBlock) {
    const uint8_t* halves = half_scales<F>(panel, b);
    float scale[2] = {half_at(halves + r * 2), 0}, addend = 0;
    if constexpr (F::kHasMin) addend = half_at(halves + 32 + r * 2);
    if constexpr (F::kNested) {
      const uint8_t* bytes = byte_scales<F>(panel, b);
      if constexpr (F::kHasMin) addend = -(addend * bytes[16 + r]);
      if constexpr (F::kHalves) scale[1] = scale[0] * static_cast<int8_t>(bytes[16 + r]);
      scale[0] *= static_cast<int8_t>(bytes[r]);
    }
    float out[kQuantBlock];  // d * q is exact in float32, so a fused addition rounds as a separate one does
    for (int i = 0; i < kQuantBlock; ++i)
      out[i] = scale[F::kHalves ? i / 16 : 0] * static_cast<float>(quant_of<F>(lines, r, i) - F::kOffset) + addend;
    for (int i = 0; i < kQuantBlock; ++i) y[i] = from_float<T>(out[i]);
  }
}

template <class F, class T>
void embedding(const QuantizedEmbeddingParams& p, const Parallel& par) {
  parallel_ranges(par, p.count, row_grain(p.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read_row<F>(p.weight, p.k, p.ids[i], static_cast<T*>(p.y) + i * p.k);
  });
}

}  // namespace

void pack_quantized(const PackQuantizedParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_QUANT(p.format, F, pack<F>(p, par))
}
void quantized_embedding(const QuantizedEmbeddingParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_QUANT(p.format, F, LLMCORE_DISPATCH_FLOAT(p.dtype, T, embedding<F, T>(p, par)))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
