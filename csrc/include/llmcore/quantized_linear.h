// Weights that stay in GGUF's quantised block formats: y = x W^T + bias, rows of W, and W's way from a file into the
// layout that the kernels read. The formats and the layout are written down in llmcore/reference/quantized.py.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

enum class QuantFormat : int { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k };

// What sets the formats apart. Weights are q * scale + addend, q unsigned.
struct QuantLayout {
  const char* name;
  int64_t block, block_bytes;  // weights of a block in a file, and its bytes
  int bits, offset;            // of q; the offset that is subtracted from q, 0 where there are minima instead
  bool nested;                 // the scales of 32 or 16 weights are themselves integers times one of 256 weights
};
constexpr QuantLayout kQuantLayouts[] = {
    {"q4_0", 32, 18, 4, 8, false},  {"q4_1", 32, 20, 4, 0, false},   {"q5_0", 32, 22, 5, 16, false},
    {"q5_1", 32, 24, 5, 0, false},  {"q8_0", 32, 34, 8, 128, false}, {"q4_k", 256, 144, 4, 0, true},
    {"q5_k", 256, 176, 5, 0, true}, {"q6_k", 256, 210, 6, 32, true},
};
constexpr int kQuantFormats = sizeof(kQuantLayouts) / sizeof(kQuantLayouts[0]);

constexpr int64_t kQuantPanel = 16;  // rows of W that lie together
constexpr int64_t kQuantBlock = 32;  // weights along k whose products are summed as integers

// A format as kernels are instantiated for it.
template <QuantFormat Which>
struct QuantFacts {
  static constexpr int kBits = kQuantLayouts[static_cast<int>(Which)].bits;
  static constexpr int kOffset = kQuantLayouts[static_cast<int>(Which)].offset;
  static constexpr bool kNested = kQuantLayouts[static_cast<int>(Which)].nested;
  static constexpr bool kHasMin = kOffset == 0;
  static constexpr bool kHalves = Which == QuantFormat::q6_k;  // a scale for each 16 weights
  static constexpr int64_t kBlockBytes = 64 * kBits;           // of the q of a panel's block
  // Of a panel's scales: the float16 of a block, or of 256 weights; and these with the 16 + 16 bytes of each block.
  static constexpr int64_t kScaleBytes = kHasMin ? 64 : 32;
  static constexpr int64_t kNestedBytes = kScaleBytes + 256;
};

// Bytes of the scales at the head of a panel, and of a whole panel; both are multiples of 64.
constexpr __attribute__((always_inline)) int64_t quant_scale_bytes(const QuantLayout& f, int64_t k) {
  const int64_t halves = f.offset ? 32 : 64;
  const int64_t bytes = f.nested ? k / 256 * (halves + 256) : k / 32 * halves;
  return (bytes + 63) / 64 * 64;
}
constexpr __attribute__((always_inline)) int64_t quant_panel_bytes(const QuantLayout& f, int64_t k) {
  return quant_scale_bytes(f, k) + k / kQuantBlock * f.bits * 64;
}

// From a file's blocks, (n, k / block * block_bytes), into panels: (n + 15) / 16 times quant_panel_bytes.
struct PackQuantizedParams {
  QuantFormat format;
  int64_t n, k;
  const uint8_t* blocks;
  uint8_t* packed;
};

// y[r][j] = bias[j] + sum_i x[r][i] W[j][i], with x rounded to int8 by blocks of 32: see
// llmcore/ops/quantized_linear.py. A row's bits depend neither on the rows beside it nor on the number of threads, nor
// on how W's rows are split among calls. Strides are in elements, so a call can fill columns of a wider matrix: the
// parts of a fused product (q and k in one format, v in another) each write their own. Any number of rows is served; k
// is a multiple of the format's block.
struct QuantizedLinearParams {
  DType dtype;  // of x, bias, y
  QuantFormat format;
  int64_t rows, n, k;
  const void* x;  // (rows, k)
  int64_t x_stride;
  const uint8_t* weight;  // (n, k), packed; best on a 64-byte boundary
  const void* bias;       // (n), or null
  void* y;                // (rows, n)
  int64_t y_stride;
};

// The same for the rows of y that are expert e's, offsets[e] <= r < offsets[e + 1], with W_e: matrix e of
// product.weight, where the packed matrices follow each other, and bias e of product.bias, (num_experts, n). With
// token_of, row r reads x[token_of[r]]. An expert's rows have the bits that quantized_linear gives them.
struct QuantizedGroupedLinearParams {
  QuantizedLinearParams product;  // rows: of all experts
  int64_t num_experts;
  const int32_t* offsets;   // (num_experts + 1): from 0 to rows, never falling
  const int32_t* token_of;  // (rows), or null
};

// y[i] = W[ids[i]], rounded to dtype. On the CPU ids are known to be in range.
struct QuantizedEmbeddingParams {
  DType dtype;  // of y
  QuantFormat format;
  int64_t count, k;
  int64_t n;              // rows of W; the CUDA kernel gives NaN for an id beyond them
  const int64_t* ids;     // (count)
  const uint8_t* weight;  // packed
  void* y;                // (count, k), contiguous
};

LLMCORE_CPU_KERNEL_INT8(quantized_linear, QuantizedLinearParams)
LLMCORE_CPU_KERNEL_INT8(quantized_grouped_linear, QuantizedGroupedLinearParams)
LLMCORE_CPU_KERNEL(pack_quantized, PackQuantizedParams)
LLMCORE_CPU_KERNEL(quantized_embedding, QuantizedEmbeddingParams)
LLMCORE_CUDA_KERNEL(quantized_linear, QuantizedLinearParams)
LLMCORE_CUDA_KERNEL(quantized_grouped_linear, QuantizedGroupedLinearParams)
LLMCORE_CUDA_KERNEL(quantized_embedding, QuantizedEmbeddingParams)

}  // namespace llmcore

// LLMCORE_DISPATCH_QUANT(p.format, F, kernel<F>(p, par)): as LLMCORE_DISPATCH_FLOAT; F is the namespace's own
// Quant<format>.
#define LLMCORE_QUANT_CASE_(format, F, ...)          \
  case ::llmcore::QuantFormat::format: {             \
    using F = Quant<::llmcore::QuantFormat::format>; \
    __VA_ARGS__;                                     \
    break;                                           \
  }
#define LLMCORE_DISPATCH_QUANT(format, F, ...) \
  switch (format) {                            \
    LLMCORE_QUANT_CASE_(q4_0, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q4_1, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q5_0, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q5_1, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q8_0, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q4_k, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q5_k, F, __VA_ARGS__)  \
    LLMCORE_QUANT_CASE_(q6_k, F, __VA_ARGS__)  \
  }
