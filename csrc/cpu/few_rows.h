// Products of a few rows with a matrix that is read once, as it lies: neither operand is packed.
//
//   dot_product_rows()  the matrix lies along k (a Linear weight): dot products along its rows
//   add_rows()          the matrix lies along n (the same weight, for the gradient of x): sums of its rows, scaled
//
// Such a product is bound by the memory that holds the matrix. 8 rows of the matrix are under way at a time, and while
// they are multiplied the next 8 are prefetched. For dot products a register tile takes R rows of x and W of the
// matrix, so that R * W products follow R + W loads; sums of rows stay in L1.
#pragma once
#include "gemm_workers.h"
#include "scratch.h"
#include "simd/shuffles.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

constexpr int64_t kFewRows = 32;    // of x, at most
constexpr int kGroup = 8;           // rows of the matrix under way at a time
constexpr int kFewTile = 3;         // rows of x in a register tile
constexpr int64_t kXBytes = 32768;  // of x in a block of k: it stays in L1 (48 KiB) beside rows of the matrix and sums

// Rows of the matrix in a register tile: 24 sums with AVX-512, else 12. As streams from memory, 8 at once are read
// faster than 4, and 4 than one.
#if defined(__AVX512F__)
constexpr int kFewWidth = kGroup;
#else
constexpr int kFewWidth = 4;
#endif

// The operands: x as X, the matrix as T. bf16 stays bf16 where the machine multiplies it, all else is float.
template <class T, bool Bf16Dot = sizeof(T) == 2 && kHasBf16Dot>
struct FewOperands {
  using X = float;
  static constexpr int kStep = kLanes;  // elements along k in a vector
  static LLMCORE_INLINE vf load_x(const X* p) { return load(p); }
  static LLMCORE_INLINE vf load_w(const T* p) { return load(p); }
  static LLMCORE_INLINE vf load_w(const T* p, int64_t n) { return load_n(p, n); }
  static LLMCORE_INLINE void pack(X* to, const T* x, int64_t n) { store(to, load_n(x, n)); }
  static LLMCORE_INLINE vf multiply_add(vf acc, vf x, vf w) { return fma(x, w, acc); }
};
template <>
struct FewOperands<f16, true> : FewOperands<f16, false> {};
template <>
struct FewOperands<bf16, true> {
  using X = bf16;
  static constexpr int kStep = 2 * kLanes;
  static LLMCORE_INLINE vu load_x(const bf16* p) {
    vu v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static LLMCORE_INLINE vu load_w(const bf16* p) { return load_x(p); }
  static LLMCORE_INLINE vu load_w(const bf16* p, int64_t n) {
    bf16 buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load_x(buffer);
  }
  static LLMCORE_INLINE void pack(X* to, const bf16* x, int64_t n) {
    const vu v = n == kStep ? load_x(x) : load_w(x, n);
    __builtin_memcpy(to, &v, sizeof(v));
  }
  static LLMCORE_INLINE vf multiply_add(vf acc, vu x, vu w) { return dot_bf16(acc, x, w); }
};

// x as the kernel reads it: blocks of k that stay in L1 (of x's own rows, which may lie a multiple of 4096 bytes apart,
// no more would than L1 has ways); in a block, groups of kFewTile rows; in a group, the rows vector by vector.
template <class T>
class PackedRows {
 public:
  using Op = FewOperands<T>;
  using X = typename Op::X;

  // RowFn: r -> const T*, k adjacent elements
  template <class RowFn>
  PackedRows(int64_t rows, int64_t k, const RowFn& row)
      : rows_(rows), k_(round_up(k, Op::kStep)), block_(k_), data_(rows * k_) {
    if (rows > kFewTile) block_ = kXBytes / (rows * static_cast<int64_t>(sizeof(X))) / Op::kStep * Op::kStep;
    for (int64_t begin = 0; begin < k; begin += block_)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = r / kFewTile * kFewTile, count = at_most(rows - first, kFewTile);
        X* to = data_.data() + begin * rows + first * at_most(k_ - begin, block_) + (r - first) * Op::kStep;
        const T* x = row(r);
        for (int64_t i = begin; i < at_most(begin + block_, k); i += Op::kStep, to += count * Op::kStep)
          Op::pack(to, x + i, at_most(k - i, Op::kStep));
      }
  }
  int64_t rows() const { return rows_; }
  int64_t block() const { return block_; }
  // Of the block that starts at `begin`, the group that starts with row `first`.
  const X* group(int64_t begin, int64_t first) const {
    return data_.data() + begin * rows_ + first * at_most(k_ - begin, block_);
  }

 private:
  static int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }
  int64_t rows_, k_, block_;
  Scratch<X> data_;
};

// One vector along k of a register tile.
template <class Op, int R, int W, class Vector>
LLMCORE_INLINE void few_step(vf (&acc)[R][W], const typename Op::X* x, const Vector (&w)[W]) {
  decltype(Op::load_x(x)) xv[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) xv[r] = Op::load_x(x + r * Op::kStep);
#pragma GCC unroll 8
  for (int v = 0; v < W; ++v)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][v] = Op::multiply_add(acc[r][v], xv[r], w[v]);
}

// Elements [begin, end) of k of one register tile: its sums (R x kFewWidth of the R x kGroup vectors) are carried from
// block to block; `first` starts them. Each vector along k prefetches Lines cache lines from `ahead` on.
template <class T, int R, int Lines>
LLMCORE_NOINLINE void few_tile(const typename FewOperands<T>::X* x, const T* const* w, int64_t begin, int64_t end,
                               const char* ahead, vf* sums, bool first) {
  using Op = FewOperands<T>;
  constexpr int W = kFewWidth;
  vf acc[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) acc[r][v] = first ? zero() : sums[r * kGroup + v];
  decltype(Op::load_w(w[0])) wv[W];
  for (; begin + Op::kStep <= end; begin += Op::kStep, x += R * Op::kStep, ahead += Lines * 64) {
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l) __builtin_prefetch(ahead + l * 64, 0, 2);
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) wv[v] = Op::load_w(w[v] + begin);
    few_step<Op>(acc, x, wv);
  }
  if (begin < end) {
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) wv[v] = Op::load_w(w[v] + begin, end - begin);
    few_step<Op>(acc, x, wv);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) sums[r * kGroup + v] = acc[r][v];
}

// y[r * y_stride + v] = bias[v] + the lanes' sum of sums[r][v], for n <= kGroup columns. Sums beyond rows are read.
template <class T>
LLMCORE_NOINLINE void store_sums(int64_t rows, int64_t n, const vf* sums, const T* bias, T* y, int64_t y_stride) {
  constexpr int kPeriod = kLanes > kGroup ? kLanes : kGroup;  // after which the columns of the flat sums repeat
  float added[kPeriod] = {};
  if (bias)
    for (int64_t i = 0; i < kPeriod; ++i) added[i] = i % kGroup < n ? to_float(bias[i % kGroup]) : 0.f;
  T out[kFewRows * kGroup];
  for (int64_t i = 0; i < rows * kGroup; i += kLanes) {
    vf v[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) v[l] = sums[i + l];
    store(out + i, sum_each(v) + load(added + i % kPeriod));
  }
  for (int64_t r = 0; r < rows; ++r)
    if (n == kGroup)
      __builtin_memcpy(y + r * y_stride, out + r * kGroup, kGroup * sizeof(T));
    else
      __builtin_memcpy(y + r * y_stride, out + r * kGroup, n * sizeof(T));
}

// The tiles of a block of k for all rows of x and kGroup rows of w, kFewWidth of them at a time: those stay in L1 while
// x passes. `ahead` moves on by what was prefetched.
template <class T, int Lines>
void few_tiles(const PackedRows<T>& x, const T* const* w, int64_t begin, int64_t end, const char*& ahead, vf* sums) {
  for (int v = 0; v < kGroup; v += kFewWidth)
    for (int64_t r = 0; r < x.rows(); r += kFewTile) {
      const auto tile = x.rows() - r == 1   ? few_tile<T, 1, Lines>
                        : x.rows() - r == 2 ? few_tile<T, 2, Lines>
                                            : few_tile<T, 3, Lines>;
      tile(x.group(begin, r), w + v, begin, end, ahead, sums + r * kGroup + v, begin == 0);
      ahead += (end - begin) / FewOperands<T>::kStep * Lines * 64;
    }
}

// y[r * y_stride + j] = bias[j] + x row r . w row j, for the rows of x (kFewRows at most) and n rows of w, w_stride
// apart. A sum is one chain per lane over all of k, then the lanes by a fixed tree: its bits depend on nothing but the
// two rows.
template <class T>
void dot_product_rows(int64_t n, int64_t k, const PackedRows<T>& x, const T* w, int64_t w_stride, const T* bias, T* y,
                      int64_t y_stride) {
  // The next group of w is prefetched evenly and in the order of its addresses: kFewWidth lines for each vector along
  // k, in parts by the tiles that read it. With one tile there is no pause in the reading, and nothing to gain.
  const int64_t passes = (x.rows() + kFewTile - 1) / kFewTile;
  const auto tiles = passes == 1   ? few_tiles<T, 0>
                     : passes == 2 ? few_tiles<T, kFewWidth / 2>
                     : passes <= 8 ? few_tiles<T, kFewWidth / 4>
                                   : few_tiles<T, 1>;
  vf sums[kFewRows * kGroup] = {};
  for (int64_t j = 0; j < n; j += kGroup) {
    const T* w_rows[kGroup];
    for (int64_t v = 0; v < kGroup; ++v) w_rows[v] = w + (j + v < n ? j + v : n - 1) * w_stride;
    const T* next = w + (j + kGroup < n ? j + kGroup : j) * w_stride;
    const char* ahead = static_cast<const char*>(static_cast<const void*>(next));
    for (int64_t begin = 0; begin < k; begin += x.block())
      tiles(x, w_rows, begin, begin + x.block() < k ? begin + x.block() : k, ahead, sums);
    store_sums(x.rows(), n - j < kGroup ? n - j : kGroup, sums, bias ? bias + j : nullptr, y + j, y_stride);
  }
}

// ---- sums of rows --------------------------------------------------------------------------------------------------

// Steps of k (pairs, where bf16 is multiplied as such) that are added to the sums at once: fewer loads of sums.
constexpr int kAddSteps = 4;
// Columns of the matrix whose sums, for `rows` rows of x, stay in L1.
LLMCORE_INLINE int64_t add_columns(int64_t rows) { return 6144 / rows / kLanes * kLanes; }

// Step `s` of k: kLanes columns (the first n; the others are 0) of its one or two rows of w; those from k on are 0.
template <class T>
LLMCORE_INLINE vf columns_of_step(ProductF32, const T* w, int64_t w_stride, int64_t k, int64_t s, int64_t n) {
  return s < k ? load_n(w + s * w_stride, n) : zero();
}
LLMCORE_INLINE vu columns_of_step(ProductBf16, const bf16* w, int64_t w_stride, int64_t k, int64_t s, int64_t n) {
  const vu even = 2 * s < k ? bit_cast<vu>(load_n(w + 2 * s * w_stride, n)) : vu{};  // a bf16 in the upper half
  const vu odd = 2 * s + 1 < k ? bit_cast<vu>(load_n(w + (2 * s + 1) * w_stride, n)) : vu{};
  return even >> 16 | odd;
}

// sums (rows, n) += x[:, s ..] w[s .. , :] for kAddSteps steps from s. x: (rows, x_stride) packed steps.
template <class Product, class T>
LLMCORE_NOINLINE void add_steps(int64_t rows, int64_t n, int64_t k, int64_t s, const typename Product::Elem* x,
                                int64_t x_stride, const T* w, int64_t w_stride, float* sums, int64_t sums_stride,
                                Prefetch next) {
  const int64_t lines = (next.lines() * kLanes + n - 1) / n;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = n - j < kLanes ? n - j : kLanes;
    next.next(lines);
    decltype(Product::load_b(x)) wv[kAddSteps];
    for (int t = 0; t < kAddSteps; ++t)
      wv[t] = lanes == kLanes ? columns_of_step(Product{}, w + j, w_stride, k, s + t, FullVector{})
                              : columns_of_step(Product{}, w + j, w_stride, k, s + t, lanes);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = sums + r * sums_stride + j;
      vf sum = zero();  // added at the end: short chains of additions lose less
      for (int t = 0; t < kAddSteps; ++t) sum = Product::multiply_add(sum, x[r * x_stride + s + t], wv[t]);
      store(to, load(to) + sum);
    }
  }
}

// y[r * y_stride + j] = sum_i x[r * x_stride + i] w[i * w_stride + j], for rows <= kFewRows and n <= add_columns(rows).
template <class T>
void add_rows(int64_t rows, int64_t n, int64_t k, const T* x, int64_t x_stride, const T* w, int64_t w_stride, T* y,
              int64_t y_stride) {
  using Product = typename GemmProduct<T, T>::type;
  using Elem = typename Product::Elem;
  const int64_t steps = round_up(steps_of<Product>(k), kAddSteps), width = round_up(n, kLanes);
  Scratch<Elem> packed(rows * steps);
  Scratch<float> sums(rows * width);
  __builtin_memset(sums.data(), 0, rows * width * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    Elem* to = packed.data() + r * steps;
    __builtin_memset(to + k / Product::kStep, 0, (steps - k / Product::kStep) * sizeof(Elem));
    if constexpr (Product::kStep == 2)
      __builtin_memcpy(to, x + r * x_stride, k * sizeof(T));
    else
      for (int64_t i = 0; i < k; ++i) to[i] = to_float(x[r * x_stride + i]);
  }
  constexpr int64_t kRows = kAddSteps * Product::kStep;  // of w at a time
  for (int64_t i = 0; i < k; i += kRows) {
    const int64_t after = k - i - kRows < kRows ? k - i - kRows : kRows;
    Prefetch next(Matrix<T>{w + (i + kRows) * w_stride, w_stride, 1}, after > 0 ? after : 0, n);
    add_steps<Product>(rows, n, k, i / Product::kStep, packed.data(), steps, w, w_stride, sums.data(), width, next);
  }
  for (int64_t r = 0; r < rows; ++r) store_row(y + r * y_stride, sums.data() + r * width, n);
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
