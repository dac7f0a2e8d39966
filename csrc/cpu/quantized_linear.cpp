// y = x W^T + bias with quantised W. x is rounded to int8 by blocks of 32, the products in a block are summed as
// integers, and blocks are added in float32, in their order:
//
//   sum += d_x (scale * dot) + (d_x * sum_x) addend        dot = sum q x_q, less offset * sum_x
//
// A register tile holds kLanes rows of W (a panel, or a part of it) and up to kTileRows rows of x. For each block the
// panel's lines become 8 vectors of bytes, which stay in registers while the rows of x pass; a row of x is read 4 bytes
// at a time, broadcast. So one kernel serves one row, where the memory that holds W binds, and hundreds, where the
// integer products do.
#include "llmcore/quantized_linear.h"

#include "dot_int8.h"
#include "expert_tasks.h"
#include "quantized_panel.h"
#include "scratch.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

#if defined(__AVX512F__) || defined(LLMCORE_EMULATE_AVX512BF16)
constexpr int kTileRows = 8, kStreams = 4;
#else
constexpr int kTileRows = 4, kStreams = 2;  // 16 registers: 8 of them hold the block of W
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};

constexpr int64_t kSerialBytes = 32768;       // of W that one thread multiplies before a second would have started
constexpr int64_t kTasksPerThread = 2;        // long stretches of memory for each thread, and yet some to even out
constexpr int64_t kExpertTasksPerThread = 4;  // of all experts: more, as their shares are uneven
constexpr int64_t kChunkBytes = 384 << 10;    // of rounded x that stays in L2 while panels of W pass
constexpr int64_t kAhead = 8192;              // bytes of W between what is prefetched, into L1, and what is multiplied

// 32 elements of a row of x, rounded.
struct XBlock {
  int8_t q[kQuantBlock];
  float scale;
  float scaled_sum;  // scale * (sum of q)
  int32_t start[2];  // -offset * (sum of q), or of its two halves
};

// The largest block of a row of x whose magnitudes are too small for 127 / largest; it becomes zeros.
constexpr float kSmallest = 0x1p-100f;

LLMCORE_INLINE void store_low_bytes(int8_t* p, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
#else
  const vb b = __builtin_convertvector(x, vb);
  __builtin_memcpy(p, &b, sizeof(b));
#endif
}

// x[i] -> out, by the rule of `quantize_activations` in llmcore/reference/quantized.py, but that of a row with an
// element that is not finite only the first block has NaN for its scale: as good for the row's sums.
template <class T>
void round_row(const T* x, int64_t k, int offset, bool halves, XBlock* out) {
  constexpr int kVectors = kQuantBlock / kLanes;
  vi bad{};
  for (int64_t b = 0; b < k / kQuantBlock; ++b, x += kQuantBlock) {
    vf v[kVectors], largest = zero();
    for (int i = 0; i < kVectors; ++i) {
      v[i] = load(x + i * kLanes);
      const vf magnitude = abs(v[i]);
      bad |= bit_cast<vi>(magnitude) >= 0x7f800000;
      largest = max(largest, magnitude);
    }
    const float top = reduce_max(largest), inverse = top >= kSmallest ? 127.f / top : 0.f;
    vf sums[2] = {zero(), zero()};
    for (int i = 0; i < kVectors; ++i) {
      const vf shifted = rounded(v[i] * inverse) + kRoundMagic;
      sums[i / (kVectors / 2)] += shifted - kRoundMagic;  // integers: exact in any order
      store_low_bytes(out[b].q + i * kLanes, bit_cast<vi>(shifted));
    }
    out[b].scale = top / 127.f;
    const float sum = reduce_sum(sums[0] + sums[1]), first = halves ? reduce_sum(sums[0]) : sum;
    out[b].scaled_sum = out[b].scale * sum;
    out[b].start[0] = -offset * static_cast<int32_t>(first);
    out[b].start[1] = -offset * static_cast<int32_t>(sum - first);
  }
  if (k > 0 && reduce_max(__builtin_convertvector(-bad, vf)) > 0) out[0].scale = out[0].scaled_sum = __builtin_nanf("");
}

// From row `lane` of each of P panels kLanes rows of W, times R rows of x, x_stride blocks apart: sums[panel][row]. The
// first tile of a panel has it from memory (Stream), and prefetches what follows.
template <class F, int R, int P, bool Stream>
void tile(const uint8_t* panel, int64_t k, int lane, const XBlock* x, vf* sums) {
  const int64_t blocks = k / kQuantBlock, panel_bytes = quant_panel_bytes(F::kLayout, k);
  vf acc[P][R];
#pragma GCC unroll 4
  for (int v = 0; v < P; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[v][r] = zero();
  const uint8_t* first = panel + quant_scale_bytes(F::kLayout, k) + lane * 4;
  for (int64_t b = 0; b < blocks; ++b, first += F::kBlockBytes, ++x) {
#pragma GCC unroll 4
    for (int v = 0; v < P; ++v) {
      const uint8_t* lines = first + v * panel_bytes;
      if constexpr (Stream) {
#pragma GCC unroll 9
        for (int l = 0; l <= F::kBits; ++l) __builtin_prefetch(lines + kAhead / P + l * 64, 0, 3);
      }
      vu w[kGroups];
      load_groups<F>(lines, w);
      const PanelScales s = load_scales<F>(panel + v * panel_bytes, b, lane);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const XBlock& xb = x[r * blocks];
        const auto products = [&](auto half, auto count) {
          constexpr int kHalf = decltype(half)::value, kCount = decltype(count)::value;
          const vi dot = dot_int8<F::kBits, kCount>(set1_i(xb.start[kHalf]), w + kHalf * 4, xb.q + kHalf * 16);
          acc[v][r] = fma(set1(xb.scale), s.scale[kHalf] * __builtin_convertvector(dot, vf), acc[v][r]);
        };
        if constexpr (F::kHasMin) acc[v][r] = fma(set1(xb.scaled_sum), s.addend, acc[v][r]);
        if constexpr (F::kHalves) {
          products(Int<0>{}, Int<4>{});
          products(Int<1>{}, Int<4>{});
        } else {
          products(Int<0>{}, Int<8>{});
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < P; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[v * R + r] = acc[v][r];
}

// What tile<F, R, ...> does with `panels` panels from column j on, and from row `row` of x.
template <class F, class T, int R>
void tile_row(const QuantizedLinearParams& p, const XBlock* x, int64_t row, int64_t j, int64_t panels, bool stream) {
  const int64_t panel_bytes = quant_panel_bytes(F::kLayout, p.k);
  const uint8_t* panel = p.weight + j / kQuantPanel * panel_bytes;
  x += row * (p.k / kQuantBlock);
  constexpr bool kSideBySide = R <= kTileRows / 2;
  for (int lane = 0; lane < kQuantPanel; lane += kLanes) {
    vf sums[kStreams * R];
    if (kSideBySide && stream && panels == kStreams)
      tile<F, R, kSideBySide ? kStreams : 1, true>(panel, p.k, lane, x, sums);
    else
      for (int64_t v = 0; v < panels; ++v)
        (stream ? tile<F, R, 1, true> : tile<F, R, 1, false>)(panel + v * panel_bytes, p.k, lane, x, sums + v * R);
    for (int64_t v = 0; v < panels; ++v) {
      const int64_t column = j + v * kQuantPanel + lane, n = p.n - column;
      if (n <= 0) break;
      const vf bias = p.bias ? load_n(static_cast<const T*>(p.bias) + column, n) : zero();
      for (int r = 0; r < R; ++r)
        store_n(static_cast<T*>(p.y) + (row + r) * p.y_stride + column, sums[v * R + r] + bias, n);
    }
  }
}

// Rows [begin, end) of x times up to kStreams panels, from column j on.
template <class F, class T>
void panel_product(const QuantizedLinearParams& p, const XBlock* x, int64_t begin, int64_t end, int64_t j,
                   int64_t panels) {
  for (int64_t r = begin; r < end;) {
    const int64_t left = end - r;
    const int rows = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto multiply = rows == kTileRows ? tile_row<F, T, kTileRows>
                          : rows == 4       ? tile_row<F, T, 4>
                          : rows == 2       ? tile_row<F, T, 2>
                                            : tile_row<F, T, 1>;
    multiply(p, x, r, j, panels, r == begin);
    r += rows;
  }
}

// The rows of x, or its rows token_of[r], rounded.
template <class F, class T>
void round_rows(const QuantizedLinearParams& p, const int32_t* token_of, XBlock* x, const Parallel& par) {
  constexpr int kOffset = F::kBits == 8 && kDotSubtracts ? 0 : F::kOffset;
  parallel_ranges(par, p.rows, row_grain(p.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      round_row(static_cast<const T*>(p.x) + (token_of ? token_of[r] : r) * p.x_stride, p.k, kOffset, F::kHalves,
                x + r * (p.k / kQuantBlock));
  });
}

int64_t panels_of(const QuantizedLinearParams& p) { return (p.n + kQuantPanel - 1) / kQuantPanel; }

// Tasks of a product: stretches of W times chunks of x.
struct Tasks {
  int64_t chunk_rows, chunks, stretches;

  Tasks(const QuantizedLinearParams& p, int64_t wanted) {  // `wanted`: about how many tasks, if there is work for them
    const int64_t row_bytes = p.k / kQuantBlock * static_cast<int64_t>(sizeof(XBlock)) + 1;
    const int64_t fit = kChunkBytes / row_bytes / kTileRows * kTileRows, panels = panels_of(p);
    chunk_rows = fit > kTileRows ? fit : kTileRows;
    chunks = (p.rows + chunk_rows - 1) / chunk_rows;
    stretches = wanted < panels ? wanted : panels;
  }
  int64_t count() const { return chunks * stretches; }
};

template <class F, class T>
void run_task(const QuantizedLinearParams& p, const XBlock* x, const Tasks& tasks, int64_t task) {
  const int64_t chunk = task / tasks.stretches, stretch = task % tasks.stretches, panels = panels_of(p);
  const int64_t begin = chunk * tasks.chunk_rows, all = p.rows - begin;
  const int64_t end = begin + (tasks.chunk_rows < all ? tasks.chunk_rows : all);
  const int64_t last = panels * (stretch + 1) / tasks.stretches, group = end - begin <= kTileRows / 2 ? kStreams : 1;
  for (int64_t i = panels * stretch / tasks.stretches; i < last; i += group)
    panel_product<F, T>(p, x, begin, end, i * kQuantPanel, last - i < group ? last - i : group);
}

// Of a product in which x has p.rows rows in all.
template <class F>
bool is_small(const QuantizedLinearParams& p) {
  return panels_of(p) * quant_panel_bytes(F::kLayout, p.k) * p.rows <= kSerialBytes;
}

template <class F, class T>
void forward(const QuantizedLinearParams& p, const Parallel& par) {
  if (p.rows == 0 || p.n == 0) return;
  const Scratch<XBlock> x(p.rows * (p.k / kQuantBlock));
  round_rows<F, T>(p, nullptr, x.data(), par);
  const Tasks tasks(p, par.threads == 1 || is_small<F>(p) ? 1 : par.threads * kTasksPerThread);
  parallel_tasks(par, tasks.count(), [&](int64_t task, int64_t) { run_task<F, T>(p, x.data(), tasks, task); });
}

// All experts' tasks are one list, and an expert has a share of them by what it costs: the reading of its matrix, as
// much as the products of a tile of rows, and the products of its rows. One expert with a row thus keeps all threads
// busy, and so do many.
template <class F, class T>
void forward_grouped(const QuantizedGroupedLinearParams& g, const Parallel& parallel) {
  const QuantizedLinearParams& p = g.product;
  if (p.rows == 0 || p.n == 0) return;
  Parallel par = parallel;
  if (is_small<F>(p)) par.threads = 1;
  const int64_t row_blocks = p.k / kQuantBlock, expert_bytes = panels_of(p) * quant_panel_bytes(F::kLayout, p.k);
  const Scratch<XBlock> x(p.rows * row_blocks);
  round_rows<F, T>(p, g.token_of, x.data(), par);
  const auto product_of = [&](int64_t e) {
    const int64_t begin = g.offsets[e];
    QuantizedLinearParams one = p;
    one.rows = g.offsets[e + 1] - begin;
    one.weight += e * expert_bytes;
    if (p.bias) one.bias = static_cast<const T*>(p.bias) + e * p.n;
    one.y = static_cast<T*>(p.y) + begin * p.y_stride;
    return one;
  };
  int64_t cost = p.rows;
  for (int64_t e = 0; e < g.num_experts; ++e) cost += g.offsets[e + 1] > g.offsets[e] ? kTileRows : 0;
  const auto tasks_of = [&](const QuantizedLinearParams& one) {
    const int64_t all = par.threads == 1 ? 1 : par.threads * kExpertTasksPerThread;
    return Tasks(one, (all * (one.rows + kTileRows) + cost - 1) / cost);
  };
  const Scratch<int64_t> first(g.num_experts + 1);
  const int64_t tasks =
      number_tasks(g.num_experts, first.data(), [&](int64_t e) { return tasks_of(product_of(e)).count(); });
  parallel_tasks(par, tasks, [&](int64_t task, int64_t) {
    const int64_t e = expert_of(first.data(), g.num_experts, task);
    const QuantizedLinearParams one = product_of(e);
    run_task<F, T>(one, x.data() + g.offsets[e] * row_blocks, tasks_of(one), task - first.data()[e]);
  });
}

}  // namespace

void quantized_linear(const QuantizedLinearParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_QUANT(p.format, F, LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<F, T>(p, par)))
}
void quantized_grouped_linear(const QuantizedGroupedLinearParams& g, const Parallel& par) {
  LLMCORE_DISPATCH_QUANT(g.product.format, F, LLMCORE_DISPATCH_FLOAT(g.product.dtype, T, forward_grouped<F, T>(g, par)))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
