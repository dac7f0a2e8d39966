// Products of a few rows with a matrix that is read once, as it lies: neither operand is packed.
//
//   dot_product_rows()  the matrix lies along k (a Linear weight): dot products along its rows
//
// Such a product is bound by the memory that holds the matrix. A register tile takes `R` rows of x and `W` of the
// matrix, so that R * W products follow R + W loads; 8 rows of the matrix are under way at a time, and while they are
// multiplied the next 8 are prefetched.
#pragma once
#include "gemm.h"
#include "scratch.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

constexpr int64_t kFewRows = 32;    // of x, at most
constexpr int kGroup = 8;           // rows of the matrix under way at a time
constexpr int kFewTile = 4;         // rows of x in a register tile
constexpr int64_t kXBytes = 32768;  // of x in a block of k: it stays in L1 (48 KiB) beside rows of the matrix and sums

#if defined(__AVX512F__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;  // 16
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
    // one group is read once for kGroup rows of the matrix: it need not be in L1
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

// Lane i of the result is the sum of v[i]'s lanes: kLanes horizontal sums for the price of two. Each round adds the
// halves of two vectors, interleaved.
LLMCORE_INLINE vf sums_of(vf (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) {
      const vu a = bit_cast<vu>(v[i]), b = bit_cast<vu>(v[i + half]);
      v[i] = bit_cast<vf>(zip<0>(a, b)) + bit_cast<vf>(zip<1>(a, b));
    }
  return v[0];
}

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

// Elements [begin, end) of k of one register tile: its sums (R x W of the R x kGroup vectors) are carried from block to
// block; `first` starts them.
template <class T, int R, int W>
LLMCORE_NOINLINE void few_tile(const typename FewOperands<T>::X* x, const T* const* w, int64_t begin, int64_t end,
                               vf* sums, bool first) {
  using Op = FewOperands<T>;
  vf acc[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) acc[r][v] = first ? zero() : sums[r * kGroup + v];
  decltype(Op::load_w(w[0])) wv[W];
  for (; begin + Op::kStep <= end; begin += Op::kStep, x += R * Op::kStep) {
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
    store(out + i, sums_of(v) + load(added + i % kPeriod));
  }
  for (int64_t r = 0; r < rows; ++r)
    if (n == kGroup)
      __builtin_memcpy(y + r * y_stride, out + r * kGroup, kGroup * sizeof(T));
    else
      __builtin_memcpy(y + r * y_stride, out + r * kGroup, n * sizeof(T));
}

// The tiles of a block of k for all rows of x and kGroup rows of w, W of them at a time: those stay in L1 while x
// passes. With each tile comes its share of `next`, what is to be in L2 by the time that the tiles are done.
template <class T, int W>
void few_tiles(const PackedRows<T>& x, const T* const* w, int64_t begin, int64_t end, Prefetch next, vf* sums) {
  const int64_t tiles = kGroup / W * ((x.rows() + kFewTile - 1) / kFewTile), lines = (next.lines() + tiles - 1) / tiles;
  for (int v = 0; v < kGroup; v += W)
    for (int64_t r = 0; r < x.rows(); r += kFewTile) {
      const auto tile = x.rows() - r == 1   ? few_tile<T, 1, W>
                        : x.rows() - r == 2 ? few_tile<T, 2, W>
                        : x.rows() - r == 3 ? few_tile<T, 3, W>
                                            : few_tile<T, 4, W>;
      next.next(lines);
      tile(x.group(begin, r), w + v, begin, end, sums + r * kGroup + v, begin == 0);
    }
}

// y[r * y_stride + j] = bias[j] + x row r . w row j, for the rows of x (kFewRows at most) and n rows of w, w_stride
// apart. A sum is one chain per lane over all of k, then the lanes by a fixed tree: its bits depend on nothing but the
// two rows.
template <class T>
void dot_product_rows(int64_t n, int64_t k, const PackedRows<T>& x, const T* w, int64_t w_stride, const T* bias, T* y,
                      int64_t y_stride) {
  // Columns of a tile: as many sums as there are registers for, and enough of them to hide an addition's latency.
  constexpr int kWide = kManyRegisters ? 2 : 1;  // rows of x that leave room for tiles of kGroup columns
  const auto tiles = x.rows() <= kWide ? few_tiles<T, kGroup> : few_tiles < T, kManyRegisters ? 4 : 2 > ;
  vf sums[kFewRows * kGroup] = {};
  for (int64_t j = 0; j < n; j += kGroup) {
    const T* w_rows[kGroup];
    for (int64_t v = 0; v < kGroup; ++v) w_rows[v] = w + (j + v < n ? j + v : n - 1) * w_stride;
    // One group of x leaves the memory no time to spare, and 8 streams are what hardware prefetchers follow.
    const int64_t ahead = x.rows() > kFewTile && j + 2 * kGroup <= n ? kGroup : 0;
    for (int64_t begin = 0; begin < k; begin += x.block()) {
      const int64_t end = begin + x.block() < k ? begin + x.block() : k;
      const Matrix<T> next{w + (j + ahead) * w_stride + begin, w_stride, 1};
      tiles(x, w_rows, begin, end, Prefetch(next, ahead, end - begin), sums);
    }
    store_sums(x.rows(), n - j < kGroup ? n - j : kGroup, sums, bias ? bias + j : nullptr, y + j, y_stride);
  }
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
