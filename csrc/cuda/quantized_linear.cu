// Products with quantised weights, for few rows of x: bound by the memory that holds the weight.
//
// A CTA takes a panel, 16 rows of W, and up to R rows of x. It rounds a chunk of these into shared memory; then its
// warps take the blocks of 32 along k in turns. Of two lines of a panel each lane reads 4 bytes, so that a warp reads
// 128 adjacent ones: lanes 0 ... 15 the first line of a pair, one row of W each, lanes 16 ... 31 the second. A lane
// sums the products of its groups of 4 weights as integers, block by block in float32; then the two halves of a warp
// and the warps are added in a fixed order.
#include "launch.cuh"
#include "quantized_panel.cuh"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 2048, kChunkBlocks = kChunk / kBlock;  // of k, in shared memory at a time
constexpr int kRows = 8;                                      // of x, in a CTA
constexpr float kSmallest = 0x1p-100f;                        // as csrc/cpu/quantized_linear.cpp

// Groups 2 i + half (i = 0 ... 3) of a block, 4 weights as signed bytes each; of 8-bit formats less their offset.
// `lines` points to the lane's row in the block's first line.
template <class F>
PTX_DEVICE void load_groups(const uint8_t* lines, int half, uint32_t (&w)[4]) {
  const auto word = [&](int line) { return *reinterpret_cast<const uint32_t*>(lines + line * 64); };
  if constexpr (F::kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = word(2 * i + half) ^ 0x80808080u;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t both = word(2 * i + half);
      w[i] = both & 0x0f0f0f0fu;
      w[i + 2] = both >> 4 & 0x0f0f0f0fu;
    }
    if constexpr (F::kBits == 5) {
      const uint32_t high = word(4);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] |= (high >> (2 * i + half) & 0x01010101u) << 4;
    }
    if constexpr (F::kBits == 6) {
      const uint32_t high[2] = {word(4), word(5)};
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] |= (high[i / 2] >> (2 * (2 * i + half) % 8) & 0x03030303u) << 4;
    }
  }
}

// Rows of x in shared memory, rounded by the rule of `quantize_activations` in llmcore/reference/quantized.py.
template <int R>
struct Rounded {
  int8_t q[R][kChunk];
  float scale[R][kChunkBlocks];
};
template <int R>
struct Shared {
  Rounded<R> x;
  float partial[kWarps][R][kPanel];
};

// 127 / x and x / 127, rounded to nearest as a division rounds them, by Markstein's corrections of a product (IBM J.
// Res. Dev. 34(1), 1990); right for every mantissa, by trial of all. nvcc's division is a call, around which registers
// spill. x: a number from 2^-100 on.
PTX_DEVICE float largest_over(float x) {
  const float m = ptx::from_bits((ptx::bits(x) & 0x7fffffu) | 0x3f800000u);  // the quotient is scaled by x's exponent
  float r = ptx::reciprocal(m);
  r = fmaf(fmaf(-m, r, 1.f), r, r);
  const float q = 127.f * r, quotient = fmaf(fmaf(-m, q, 127.f), r, q);
  return ptx::from_bits(ptx::bits(quotient) + (127u << 23) - (ptx::bits(x) & 0x7f800000u));
}
PTX_DEVICE float over_largest(float x) {
  constexpr float kInverse = 1.f / 127.f;
  const float q = x * kInverse;
  return fmaf(fmaf(-127.f, q, x), kInverse, q);
}

// A warp rounds a block, an element in each lane. row_at(i): row i of x, from the chunk's first element on.
template <class T, int R, class RowAt>
PTX_DEVICE void round_chunk(const RowAt& row_at, int rows, int blocks, Rounded<R>& to) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < rows * blocks; i += kWarps) {
    const int row = i / blocks, b = i % blocks;
    const float value = to_float(row_at(row)[b * kBlock + lane]);
    const uint32_t bits = ptx::warp_max(ptx::bits(fabsf(value)));
    const bool finite = bits < 0x7f800000u;
    const float top = ptx::from_bits(bits), inverse = finite && top >= kSmallest ? largest_over(top) : 0.f;
    to.q[row][b * kBlock + lane] =
        static_cast<int8_t>(finite ? static_cast<int>(rintf(ptx::product(value, inverse))) : 0);
    if (lane == 0) to.scale[row][b] = finite ? over_largest(top) : ptx::from_bits(0x7fc00000u);
  }
}

// Adds to acc what the lane's groups of block `b` give, which is block `at` of the chunk.
template <class F, int R>
PTX_DEVICE void add_block(const uint8_t* panel, const uint8_t* lines, int64_t b, int at, const Rounded<R>& x, int rows,
                          float (&acc)[R]) {
  constexpr int kOffset = F::kBits == 8 ? 0 : F::kOffset;
  const int half = threadIdx.x % 32 / kPanel;
  uint32_t w[4];
  load_groups<F>(lines + b * F::kBlockBytes, half, w);
  const Scales s = scales_of<F>(panel, b, threadIdx.x % kPanel);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (R > 1 && r >= rows) break;
    const uint32_t* q = reinterpret_cast<const uint32_t*>(x.q[r] + at * kBlock) + half;
    int dot[2] = {0, 0}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dot[i / 2] = ptx::dot_int8(w[i], q[2 * i], dot[i / 2]);
      if constexpr (kOffset || F::kHasMin) sum[i / 2] = ptx::dot_int8(0x01010101u, q[2 * i], sum[i / 2]);
    }
    float value;
    if constexpr (F::kHalves)
      value = s.scale[0] * static_cast<float>(dot[0] - kOffset * sum[0]) +
              s.scale[1] * static_cast<float>(dot[1] - kOffset * sum[1]);
    else
      value = s.scale[0] * static_cast<float>(dot[0] + dot[1] - kOffset * (sum[0] + sum[1]));
    if constexpr (F::kHasMin) value += s.addend * static_cast<float>(sum[0] + sum[1]);
    acc[r] += x.scale[r][at] * value;
  }
}

// The panel blockIdx.x of W, which starts at `weight`, times rows `first` ... `first + rows - 1` of y, up to R.
// source(r): the row of x that row r of y is made of. `bias`: of W's rows, or null.
template <class F, class T, int R, class Source>
PTX_DEVICE void panel_product(const QuantizedLinearParams& p, const uint8_t* weight, const T* bias, int64_t scale_bytes,
                              int64_t panel_bytes, int64_t first, int rows, const Source& source) {
  PTX_SHARED_MEMORY(memory);
  Shared<R>& shared = *reinterpret_cast<Shared<R>*>(memory);
  const uint8_t* panel = weight + blockIdx.x * panel_bytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint8_t* lines = panel + scale_bytes + lane % kPanel * 4;
  float acc[R] = {};
  for (int64_t begin = 0; begin < p.k; begin += kChunk) {
    const int blocks = static_cast<int>(p.k - begin < kChunk ? p.k - begin : kChunk) / kBlock;
    const T* x = static_cast<const T*>(p.x) + begin;
    round_chunk<T, R>([&](int row) { return x + source(first + row) * p.x_stride; }, rows, blocks, shared.x);
    ptx::syncthreads();
    for (int b = warp; b < blocks; b += kWarps)
      add_block<F, R>(panel, lines, begin / kBlock + b, b, shared.x, rows, acc);
    ptx::syncthreads();
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float sum = acc[r] + ptx::shfl_xor(acc[r], kPanel);
    if (lane < kPanel) shared.partial[warp][r][lane] = sum;
  }
  ptx::syncthreads();
  const int row = threadIdx.x / kPanel, column = threadIdx.x % kPanel;
  const int64_t j = int64_t{blockIdx.x} * kPanel + column;
  if (row < rows && j < p.n) {
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < kWarps; ++v) sum += shared.partial[v][row][column];
    if (bias) sum += to_float(bias[j]);
    static_cast<T*>(p.y)[(first + row) * p.y_stride + j] = from_float<T>(sum);
  }
  // the barriers of the next tile's chunks stand between this reading of `partial` and its writing
}

// The grid's x: panels; its y: tiles of R rows of x (in strides, when there are more than it may have).
template <class F, class T, int R>
__global__ void __launch_bounds__(kThreads, 4)
    multiply(QuantizedLinearParams p, int64_t scale_bytes, int64_t panel_bytes) {
  const int64_t all = R == 1 ? 1 : p.rows;  // the loop ends after one turn, which saves registers
  for (int64_t first = int64_t{blockIdx.y} * R; first < all; first += int64_t{gridDim.y} * R)
    panel_product<F, T, R>(p, p.weight, static_cast<const T*>(p.bias), scale_bytes, panel_bytes, first,
                           static_cast<int>(all - first < R ? all - first : R), [](int64_t r) { return r; });
}

// The grid's x: panels; its y: experts (in strides), whose rows a CTA takes tile by tile.
template <class F, class T>
__global__ void __launch_bounds__(kThreads, 4)
    multiply_grouped(QuantizedGroupedLinearParams g, int64_t scale_bytes, int64_t panel_bytes) {
  const QuantizedLinearParams& p = g.product;
  for (int64_t e = blockIdx.y; e < g.num_experts; e += gridDim.y) {
    const int64_t end = g.offsets[e + 1];
    for (int64_t first = g.offsets[e]; first < end; first += kRows)
      panel_product<F, T, kRows>(p, p.weight + e * gridDim.x * panel_bytes,
                                 p.bias ? static_cast<const T*>(p.bias) + e * p.n : nullptr, scale_bytes, panel_bytes,
                                 first, static_cast<int>(end - first < kRows ? end - first : kRows),
                                 [&](int64_t r) { return g.token_of ? int64_t{g.token_of[r]} : r; });
  }
}

constexpr int64_t kMostBlocks = 65535;  // of a grid's y

// run(scale_bytes, panel_bytes, panels) for a weight that kernels can read.
template <class F, class Run>
Status with_layout(const QuantizedLinearParams& p, const Run& run) {
  constexpr QuantLayout kLayout = kQuantLayouts[static_cast<int>(F::kFormat)];
  if (reinterpret_cast<uintptr_t>(p.weight) % 4 != 0)
    return "the packed weight does not begin at a multiple of 4 bytes";
  return run(quant_scale_bytes(kLayout, p.k), quant_panel_bytes(kLayout, p.k), (p.n + kQuantPanel - 1) / kQuantPanel);
}

template <class F, class T>
Status start(const QuantizedLinearParams& p, const Device& device) {
  return with_layout<F>(p, [&](int64_t scale_bytes, int64_t panel_bytes, int64_t panels) {
    const auto run = [&](auto kernel, int64_t rows, int shared_bytes) {
      const int64_t tiles = (p.rows + rows - 1) / rows;
      return launch(kernel, {panels, tiles < kMostBlocks ? tiles : kMostBlocks}, kThreads, shared_bytes, device, p,
                    scale_bytes, panel_bytes);
    };
    return p.rows == 1 ? run(multiply<F, T, 1>, 1, sizeof(Shared<1>))
                       : run(multiply<F, T, kRows>, kRows, sizeof(Shared<kRows>));
  });
}

template <class F, class T>
Status start_grouped(const QuantizedGroupedLinearParams& g, const Device& device) {
  if (g.product.rows == 0) return nullptr;
  return with_layout<F>(g.product, [&](int64_t scale_bytes, int64_t panel_bytes, int64_t panels) {
    const int64_t experts = g.num_experts < kMostBlocks ? g.num_experts : kMostBlocks;
    return launch(multiply_grouped<F, T>, {panels, experts}, kThreads, sizeof(Shared<kRows>), device, g, scale_bytes,
                  panel_bytes);
  });
}

}  // namespace

Status quantized_linear(const QuantizedLinearParams& p, const Device& device) {
  LLMCORE_DISPATCH_QUANT(p.format, F, LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (start<F, T>(p, device))))
  return "unknown dtype or format";
}

Status quantized_grouped_linear(const QuantizedGroupedLinearParams& p, const Device& device) {
  LLMCORE_DISPATCH_QUANT(p.product.format, F,
                         LLMCORE_DISPATCH_FLOAT(p.product.dtype, T, return (start_grouped<F, T>(p, device))))
  return "unknown dtype or format";
}

}  // namespace cuda
}  // namespace llmcore
