// The matrix product that attention, the grouped GEMM and the fused losses are built on.
//
//   micro()   a register tile: R rows of A times one panel of B, kPanelVectors vectors wide
//   pack_*()  copies operands into the order micro() reads, converting 16-bit floats on the way
//   gemm()    blocked single-threaded product of two strided matrices; callers split the work among threads
//
// The blocking is that of Goto & van de Geijn (ACM TOMS 34, 2008): a panel of B stays in L1 while rows of A stream
// past.
#pragma once
#include "scratch.h"
#include "simd/shuffles.h"

// Out of line: a dozen copies of the inner loop at every call would only cost compile time.
#define LLMCORE_NOINLINE inline __attribute__((noinline))

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// Register tile: kTileRows x (kPanelVectors * kLanes) accumulators, leaving room for B and a broadcast.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kPanelVectors = 2;  // 24 of 32 registers
#else
constexpr int kTileRows = 6, kPanelVectors = 2;  // 12 of 16 registers
#endif
constexpr int kPanel = kPanelVectors * kLanes;  // columns of B in one panel
constexpr int64_t kChainSteps = 128;            // products summed in one chain before they meet the rest

LLMCORE_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// How products are formed: of which values, and packed as what. One "step" of k is one 32-bit packed element.
struct ProductF32 {
  using Value = float;
  using Elem = float;
  static constexpr int kStep = 1;
  static LLMCORE_INLINE vf multiply_add(vf acc, Elem a, vf b) { return fma(set1(a), b, acc); }
  static LLMCORE_INLINE vf load_b(const Elem* p) { return load(p); }
};
struct ProductBf16 {
  using Value = bf16;
  using Elem = uint32_t;  // holds the pair (k, k + 1)
  static constexpr int kStep = 2;
  static LLMCORE_INLINE vf multiply_add(vf acc, Elem a, vu b) { return dot_bf16(acc, a - vu{}, b); }
  static LLMCORE_INLINE vu load_b(const Elem* p) {
    vu v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
};

// Steps of `n` values along k.
template <class Product>
LLMCORE_INLINE constexpr int64_t steps_of(int64_t n) {
  return (n + Product::kStep - 1) / Product::kStep;
}

// c (R, kPanel) (+)= a (R, steps) * b (steps, kPanel). a's element (r, s) is a[r * a_row + s * a_step], b's row s
// starts at b + s * kPanel, c's row r at c + r * c_stride.
template <class Product, int R, int Vectors>
LLMCORE_INLINE void micro_rows(int64_t steps, const typename Product::Elem* a, int64_t a_row, int64_t a_step,
                               const typename Product::Elem* b, float* c, int64_t c_stride, bool accumulate) {
  vf acc[R][Vectors];
#pragma GCC unroll 16  // or GCC 12 keeps them in memory
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) acc[r][j] = zero();
  for (int64_t s = 0; s < steps; ++s) {
    decltype(Product::load_b(b)) bv[Vectors];
    for (int j = 0; j < Vectors; ++j) bv[j] = Product::load_b(b + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < Vectors; ++j) acc[r][j] = Product::multiply_add(acc[r][j], a[r * a_row], bv[j]);
    a += a_step;
    b += kPanel;
  }
  // Added at the end, not carried through: short chains of additions lose less.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) {
      float* to = c + r * c_stride + j * kLanes;
      store(to, accumulate ? acc[r][j] + load(to) : acc[r][j]);
    }
}

// A full tile of rows of a row-major a times half a panel.
template <class Product>
LLMCORE_NOINLINE void micro_half(int64_t steps, const typename Product::Elem* a, int64_t a_stride,
                                 const typename Product::Elem* b, float* c, int64_t c_stride, bool accumulate) {
  micro_rows<Product, kTileRows, 1>(steps, a, a_stride, 1, b, c, c_stride, accumulate);
}

// `rows` <= kTileRows. Rows = true: a is row-major (a_row is the row stride, steps are adjacent); false: a is column-
// major (a_step is the stride of a step, rows are adjacent).
template <class Product, bool RowMajor>
LLMCORE_NOINLINE void micro(int rows, int64_t steps, const typename Product::Elem* a, int64_t a_stride,
                            const typename Product::Elem* b, float* c, int64_t c_stride, bool accumulate) {
  const int64_t a_row = RowMajor ? a_stride : 1, a_step = RowMajor ? 1 : a_stride;
#define LLMCORE_ROWS(R)                                                                           \
  case R:                                                                                         \
    if constexpr (R <= kTileRows)                                                                 \
      micro_rows<Product, R, kPanelVectors>(steps, a, a_row, a_step, b, c, c_stride, accumulate); \
    break;
  switch (rows) {
    LLMCORE_ROWS(1)
    LLMCORE_ROWS(2)
    LLMCORE_ROWS(3)
    LLMCORE_ROWS(4)
    LLMCORE_ROWS(5)
    LLMCORE_ROWS(6)
    LLMCORE_ROWS(7)
    LLMCORE_ROWS(8)
    LLMCORE_ROWS(9)
    LLMCORE_ROWS(10)
    LLMCORE_ROWS(11)
    LLMCORE_ROWS(12)
  }
#undef LLMCORE_ROWS
}

// c (rows, panels * kPanel) (+)= a * b. b: panels of (>= steps, kPanel), `panel_stride` elements apart. Row-major a:
// element (r, s) at a[r * a_stride + s]; column-major: a[s * a_stride + r].
template <class Product, bool RowMajor>
inline void multiply_panels(int64_t rows, int64_t panels, int64_t steps, const typename Product::Elem* a,
                            int64_t a_stride, const typename Product::Elem* b, int64_t panel_stride, float* c,
                            int64_t c_stride, bool accumulate) {
  for (int64_t j = 0; j < panels; ++j)
    for (int64_t r = 0; r < rows; r += kTileRows)
      for (int64_t s = 0; s < steps; s += kChainSteps) {
        const int tile = static_cast<int>(rows - r < kTileRows ? rows - r : kTileRows);
        const int64_t count = steps - s < kChainSteps ? steps - s : kChainSteps;
        micro<Product, RowMajor>(tile, count, a + (RowMajor ? r * a_stride + s : s * a_stride + r), a_stride,
                                 b + j * panel_stride + s * kPanel, c + r * c_stride + j * kPanel, c_stride,
                                 accumulate || s > 0);
      }
}

// The same of the columns [begin, end), multiples of kLanes, of which c holds all: half a panel is not multiplied where
// it would be left over at either end of a full tile of rows.
template <class Product>
inline void multiply_columns(int64_t rows, int64_t begin, int64_t end, int64_t steps, const typename Product::Elem* a,
                             int64_t a_stride, const typename Product::Elem* b, float* c, int64_t c_stride) {
  static_assert(kPanel == 2 * kLanes, "a panel has two halves");
  const auto half = [&](int64_t at) {
    const typename Product::Elem* from = b + at / kPanel * kPanel * steps + at % kPanel;
    for (int64_t s = 0; s < steps; s += kChainSteps)
      micro_half<Product>(steps - s < kChainSteps ? steps - s : kChainSteps, a + s, a_stride, from + s * kPanel, c + at,
                          c_stride, s > 0);
  };
  const bool full = rows == kTileRows;
  if (full && begin % kPanel) half(begin), begin += kLanes;
  const bool last = full && end % kPanel && begin < end;
  const int64_t first = begin / kPanel, panels = (end - first * kPanel + kPanel - 1) / kPanel - (last ? 1 : 0);
  multiply_panels<Product, true>(rows, panels, steps, a, a_stride, b + first * kPanel * steps, kPanel * steps,
                                 c + first * kPanel, c_stride, false);
  if (last) half(end - kLanes);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// A matrix by strides: element (i, j) at data[i * row_stride + j * col_stride]. One of the two is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, col_stride;
};

// out (k, Width): out[s * Width + i] = row i's element s, for `count` rows, 1 <= count <= Width, that start at row(i)
// and whose elements are adjacent; the last row stands in for the missing ones. A transpose: rows become columns.
// RowFn: i -> const T*.
template <int Width, class RowFn>
inline void pack_transposed(float* out, int64_t count, int64_t k, const RowFn& row) {
#pragma GCC unroll 4
  for (int i = 0; i < Width; i += kLanes) {
    const int lanes = Width - i < kLanes ? Width - i : kLanes;
    decltype(row(0)) in[kLanes];
    for (int r = 0; r < kLanes; ++r) in[r] = row(i + r < count ? i + r : count - 1);
    int64_t s = 0;
    for (; s + kLanes <= k; s += kLanes) {
      vu block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = r < lanes ? bit_cast<vu>(load(in[r] + s)) : vu{};
      transpose(block);
      for (int r = 0; r < kLanes; ++r) __builtin_memcpy(out + (s + r) * Width + i, &block[r], lanes * sizeof(float));
    }
    for (; s < k; ++s)
      for (int r = 0; r < lanes; ++r) out[s * Width + i + r] = to_float(in[r][s]);
  }
}

// The same for bf16 pairs: out (ceil(k / 2), Width) of pairs (s, s + 1); an odd last element is paired with 0.
template <int Width, class RowFn>
inline void pack_transposed(uint32_t* out, int64_t count, int64_t k, const RowFn& row) {
#pragma GCC unroll 4
  for (int i = 0; i < Width; i += kLanes) {
    const int lanes = Width - i < kLanes ? Width - i : kLanes;
    const bf16* in[kLanes];
    for (int r = 0; r < kLanes; ++r) in[r] = row(i + r < count ? i + r : count - 1);
    int64_t s = 0;
    for (; s + kLanes <= k / 2; s += kLanes) {
      vu block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        block[r] = vu{};
        if (r < lanes) __builtin_memcpy(&block[r], in[r] + 2 * s, sizeof(vu));
      }
      transpose(block);
      for (int r = 0; r < kLanes; ++r) __builtin_memcpy(out + (s + r) * Width + i, &block[r], lanes * sizeof(uint32_t));
    }
    for (; s < (k + 1) / 2; ++s)
      for (int r = 0; r < lanes; ++r)
        out[s * Width + i + r] =
            in[r][2 * s].bits | (2 * s + 1 < k ? static_cast<uint32_t>(in[r][2 * s + 1].bits) << 16 : 0);
  }
}

// out: panels of (k, Width) covering n columns: step s of panel j holds row s's columns j * Width + [0, Width), zero
// beyond n. Rows are adjacent elements starting at row(s). RowFn: s -> const T*.
template <int Width, class RowFn>
inline void pack_rows(float* out, int64_t n, int64_t k, const RowFn& row) {
  for (int64_t s = 0; s < k; ++s) {
    const auto* in = row(s);
    for (int64_t j = 0; j < n; j += Width) {
      float* to = out + j * k + s * Width;
      if (j + Width <= n) {
        int v = 0;
        for (; v + kLanes <= Width; v += kLanes) store(to + v, load(in + j + v));
        for (; v < Width; ++v) to[v] = to_float(in[j + v]);
      } else {
        for (int v = 0; v < Width; ++v) to[v] = j + v < n ? to_float(in[j + v]) : 0.f;
      }
    }
  }
}

// The same for bf16 pairs: step s holds the pairs (row 2s, row 2s + 1) of each column; an odd last row pairs with 0.
template <int Width, class RowFn>
inline void pack_rows(uint32_t* out, int64_t n, int64_t k, const RowFn& row) {
  const int64_t steps = (k + 1) / 2;
  for (int64_t s = 0; s < steps; ++s) {
    const bf16 *even = row(2 * s), *odd = 2 * s + 1 < k ? row(2 * s + 1) : nullptr;
    for (int64_t j = 0; j < n; j += Width) {
      uint32_t* to = out + j * steps + s * Width;
      if (j + Width <= n && odd) {
        int v = 0;
        for (; v + 2 * kLanes <= Width; v += 2 * kLanes) {
          vu pairs[2];
          pair_up(even + j + v, odd + j + v, pairs[0], pairs[1]);
          __builtin_memcpy(to + v, pairs, sizeof(pairs));
        }
        for (; v < Width; ++v) to[v] = even[j + v].bits | static_cast<uint32_t>(odd[j + v].bits) << 16;
      } else {
        for (int64_t v = 0; v < Width; ++v)
          to[v] = j + v < n ? even[j + v].bits | static_cast<uint32_t>(odd ? odd[j + v].bits : 0) << 16 : 0u;
      }
    }
  }
}

// ---- blocked product -----------------------------------------------------------------------------------------------

// bf16 matrices are multiplied as such where the machine can; everything else is widened to float when it is packed.
template <class TA, class TB>
struct GemmProduct {
  using type = ProductF32;
};
#if defined(__AVX512BF16__) || defined(LLMCORE_EMULATE_AVX512BF16)
template <>
struct GemmProduct<bf16, bf16> {
  using type = ProductBf16;
};
#endif

// Blocks, in steps of k: a panel of B (256 x kPanel elements) then takes 32 KiB with AVX-512, its block (256 x 256) a
// quarter of a 1 MiB L2. Sums are still formed in chains of kChainSteps.
constexpr int64_t kBlockSteps = 2 * kChainSteps, kBlockN = 256, kBlockM = 22 * kTileRows;

// Operands are packed as 32-bit elements: floats, or pairs of bf16.
struct GemmScratch {
  template <class Elem>
  Elem* a() {
    return static_cast<Elem*>(static_cast<void*>(a_.data()));
  }
  template <class Elem>
  Elem* b() {
    return static_cast<Elem*>(static_cast<void*>(b_.data()));
  }
  float* edge() { return edge_.data(); }

 private:
  Scratch<float> a_{kBlockM * kBlockSteps}, b_{kBlockN * kBlockSteps}, edge_{kTileRows * kPanel};
};

// m (count, k) in groups of Width rows, each packed as (steps of k, Width); rows beyond count are zero.
template <int Width, class Elem, class T>
LLMCORE_NOINLINE void gemm_pack(Elem* out, int64_t count, int64_t k, int64_t steps, Matrix<T> m) {
  if (m.row_stride == 1) {
    pack_rows<Width>(out, count, k, [&](int64_t s) { return m.data + s * m.col_stride; });
    return;
  }
  for (int64_t i = 0; i < count; i += Width)
    pack_transposed<Width>(out + i * steps, count - i < Width ? count - i : Width, k,
                           [&](int64_t r) { return m.data + (i + r) * m.row_stride; });
}

// Brings a block of a matrix into L2 little by little, while the block before it is multiplied: packing reads rows that
// are far apart and short, which no hardware prefetcher follows.
class Prefetch {
 public:
  template <class T>
  Prefetch(Matrix<T> m, int64_t rows, int64_t cols) {
    const bool by_rows = m.col_stride == 1;
    at_ = reinterpret_cast<const char*>(m.data);
    stride_ = (by_rows ? m.row_stride : m.col_stride) * sizeof(T);
    bytes_ = (by_rows ? cols : rows) * sizeof(T);
    left_ = by_rows ? rows : cols;
  }
  int64_t lines() const { return left_ * ((bytes_ + 63) / 64); }
  void next(int64_t lines) {
    for (; lines > 0 && left_ > 0; --lines) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= bytes_) offset_ = 0, at_ += stride_, --left_;
    }
  }

 private:
  const char* at_;
  int64_t stride_, bytes_, left_, offset_ = 0;
};

// c (m, n) = a (m, k) * b (k, n), or c += when `accumulate`; c is float, row-major with c_stride. Single-threaded.
template <class TA, class TB>
LLMCORE_NOINLINE void gemm(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, float* c, int64_t c_stride,
                           bool accumulate, GemmScratch& scratch) {
  using Product = typename GemmProduct<TA, TB>::type;
  using Elem = typename Product::Elem;
  constexpr int64_t kBlockK = kBlockSteps * Product::kStep;
  if (k == 0 && !accumulate)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * c_stride + j] = 0.f;
  for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
    const int64_t kb = k - k0 < kBlockK ? k - k0 : kBlockK, steps = steps_of<Product>(kb);
    const bool add = accumulate || k0 > 0;
    for (int64_t n0 = 0; n0 < n; n0 += kBlockN) {
      const int64_t nb = n - n0 < kBlockN ? n - n0 : kBlockN;
      // The block of b after this one: to its right, else the first of the next k.
      const int64_t next_k = n0 + kBlockN < n ? k0 : k0 + kBlockK, next_n = n0 + kBlockN < n ? n0 + kBlockN : 0;
      Prefetch next_b(Matrix<TB>{b.data + next_k * b.row_stride + next_n * b.col_stride, b.row_stride, b.col_stride},
                      next_k < k ? (k - next_k < kBlockK ? k - next_k : kBlockK) : 0,
                      n - next_n < kBlockN ? n - next_n : kBlockN);
      const int64_t tiles = (nb + kPanel - 1) / kPanel * ((m + kTileRows - 1) / kTileRows),
                    lines_per_tile = (next_b.lines() + tiles - 1) / tiles;
      Elem* b_packed = scratch.b<Elem>();
      gemm_pack<kPanel>(b_packed, nb, kb, steps,
                        Matrix<TB>{b.data + k0 * b.row_stride + n0 * b.col_stride, b.col_stride, b.row_stride});
      for (int64_t m0 = 0; m0 < m; m0 += kBlockM) {
        const int64_t mb = m - m0 < kBlockM ? m - m0 : kBlockM;
        Elem* a_packed = scratch.a<Elem>();
        if (n0 == 0 || m > kBlockM)  // else it is there already
          gemm_pack<kTileRows>(a_packed, mb, kb, steps,
                               Matrix<TA>{a.data + m0 * a.row_stride + k0 * a.col_stride, a.row_stride, a.col_stride});
        for (int64_t j = 0; j < nb; j += kPanel)
          for (int64_t i = 0; i < mb; i += kTileRows) {
            const int64_t rows = mb - i < kTileRows ? mb - i : kTileRows;
            next_b.next(lines_per_tile);
            const auto multiply = [&](float* to, int64_t to_stride, bool onto) {
              multiply_panels<Product, false>(rows, 1, steps, a_packed + i * steps, kTileRows, b_packed + j * steps, 0,
                                              to, to_stride, onto);
            };
            float* to = c + (m0 + i) * c_stride + n0 + j;
            if (j + kPanel <= nb) {
              multiply(to, c_stride, add);
              continue;
            }
            float* edge = scratch.edge();  // the panel is wider than what is left of c
            multiply(edge, kPanel, false);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t v = 0; v < nb - j; ++v)
                to[r * c_stride + v] = edge[r * kPanel + v] + (add ? to[r * c_stride + v] : 0.f);
          }
      }
    }
  }
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
