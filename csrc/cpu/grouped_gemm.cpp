#include "llmcore/grouped_gemm.h"

#include "activations.h"
#include "gemm_workers.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kRowBlock = kBlockM;            // of one task: packed once for all its columns
constexpr int64_t kMaxColumnBlock = 4 * kBlockN;  // of one task
constexpr int kDirectRows = 4;                    // experts with so few rows read their weights once, unpacked
constexpr int64_t kDirectColumns = 256;           // of one direct task: its sums stay in L1

LLMCORE_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
LLMCORE_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// Columns of a task: wide, unless the threads would then lack tasks.
int64_t column_block(int64_t row_blocks, int64_t columns, int threads) {
  int64_t block = kMaxColumnBlock;
  while (block > kBlockN && row_blocks * blocks(columns, block) < 3 * threads) block /= 2;
  return block;
}

// Numbers the tasks of all experts: first[e] .. first[e + 1] are those of expert e.
template <class CountFn>
int64_t number_tasks(int64_t num_experts, int64_t* first, const CountFn& count) {
  first[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) first[e + 1] = first[e] + count(e);
  return first[num_experts];
}
int64_t expert_of(const int64_t* first, int64_t num_experts, int64_t task) {  // the last e with first[e] <= task
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= task ? low : high) = middle;
  }
  return low;
}

// sums[r][j] = x[r] . w[j] for R rows of x (floats, k apart) and n rows of w.
template <class T, int R>
void dot_rows(const float* x, const T* w, int64_t w_stride, int64_t n, int64_t k, float* sums, int64_t sums_stride) {
  constexpr int W = R == 1 ? 4 : 2;  // rows of w at a time: enough sums in flight to hide the latency of an addition
  for (int64_t j = 0; j < n; j += W) {
    const T* rows[W];
    for (int v = 0; v < W; ++v) rows[v] = w + at_most(j + v, n - 1) * w_stride;
    vf acc[R][W] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
      for (int v = 0; v < W; ++v) {
        const vf wv = load(rows[v] + i);
        for (int r = 0; r < R; ++r) acc[r][v] = fma(load(x + r * k + i), wv, acc[r][v]);
      }
    if (i < k)
      for (int v = 0; v < W; ++v) {
        const vf wv = load_n(rows[v] + i, k - i);
        for (int r = 0; r < R; ++r) acc[r][v] = fma(load_n(x + r * k + i, k - i), wv, acc[r][v]);
      }
    for (int v = 0; v < W && j + v < n; ++v)
      for (int r = 0; r < R; ++r) sums[r * sums_stride + j + v] = reduce_sum(acc[r][v]);
  }
}

// sums[r][j] = sum_i x[r][i] w[i][j]: w is read row by row, n adjacent elements of each.
template <class T, int R>
void add_rows(const float* x, const T* w, int64_t w_stride, int64_t n, int64_t k, float* sums, int64_t sums_stride) {
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < n; ++j) sums[r * sums_stride + j] = 0.f;
  for (int64_t i = 0; i < k; i += 2) {
    const bool pair = i + 1 < k;
    const T *even = w + i * w_stride, *odd = pair ? even + w_stride : even;
    vf xe[R], xo[R];
    for (int r = 0; r < R; ++r) {
      xe[r] = set1(x[r * k + i]);
      xo[r] = set1(pair ? x[r * k + i + 1] : 0.f);
    }
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const vf we = load(even + j), wo = pair ? load(odd + j) : zero();
      for (int r = 0; r < R; ++r) {
        float* to = sums + r * sums_stride + j;
        store(to, fma(xo[r], wo, fma(xe[r], we, load(to))));
      }
    }
    if (j < n) {
      const vf we = load_n(even + j, n - j), wo = pair ? load_n(odd + j, n - j) : zero();
      for (int r = 0; r < R; ++r) {
        float* to = sums + r * sums_stride + j;
        store_n(to, fma(xo[r], wo, fma(xe[r], we, load_n(to, n - j))), n - j);
      }
    }
  }
}

// y (rows, n) = x (rows, k) * b (k, n) for rows <= kDirectRows. `x_rows` holds kDirectRows * k floats, `sums`
// kDirectRows * kDirectColumns.
template <class T>
void multiply_few(int64_t rows, int64_t n, int64_t k, const T* x, int64_t x_stride, Matrix<T> b, T* y, int64_t y_stride,
                  float* x_rows, float* sums) {
  const int64_t padded = rows == 3 ? 4 : rows;
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t i = 0; i < k; ++i) x_rows[r * k + i] = r < rows ? to_float(x[r * x_stride + i]) : 0.f;
  if (b.col_stride == 1) {
    auto f = padded == 1 ? add_rows<T, 1> : padded == 2 ? add_rows<T, 2> : add_rows<T, 4>;
    f(x_rows, b.data, b.row_stride, n, k, sums, kDirectColumns);
  } else {
    auto f = padded == 1 ? dot_rows<T, 1> : padded == 2 ? dot_rows<T, 2> : dot_rows<T, 4>;
    f(x_rows, b.data, b.col_stride, n, k, sums, kDirectColumns);
  }
  for (int64_t r = 0; r < rows; ++r) store_row(y + r * y_stride, sums + r * kDirectColumns, n);
}

// Rows token_of[r] of x, gathered; x itself without token_of.
template <class T>
class GatheredRows {
 public:
  GatheredRows(const void* x, int64_t stride, const int32_t* token_of, int64_t rows, int64_t k, const Parallel& par)
      : x_(static_cast<const T*>(x)), stride_(stride), gathered_(token_of ? rows * k : 0) {
    if (!token_of) return;
    parallel_ranges(par, rows, row_grain(k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        __builtin_memcpy(gathered_.data() + r * k, x_ + token_of[r] * stride, k * sizeof(T));
    });
    x_ = gathered_.data();
    stride_ = k;
  }
  const T* data() const { return x_; }
  int64_t stride() const { return stride_; }

 private:
  const T* x_;
  int64_t stride_;
  Scratch<T> gathered_;
};

template <class T>
void multiply(const GroupedGemmParams& p, const Parallel& par) {
  const GatheredRows<T> all_x(p.x, p.x_stride, p.token_of, p.rows, p.k, par);
  Scratch<int64_t> first(p.num_experts + 1);
  const auto rows_of = [&](int64_t e) -> int64_t { return p.offsets[e + 1] - p.offsets[e]; };
  int64_t all_row_blocks = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) all_row_blocks += blocks(rows_of(e), kRowBlock);
  const int64_t columns = column_block(all_row_blocks, p.n, par.threads);
  const int64_t tasks = number_tasks(p.num_experts, first.data(), [&](int64_t e) -> int64_t {
    const int64_t rows = rows_of(e);
    return rows <= kDirectRows ? (rows > 0) * blocks(p.n, kDirectColumns)
                               : blocks(rows, kRowBlock) * blocks(p.n, columns);
  });
  GemmWorkers workers(par.threads, kRowBlock * columns);
  Scratch<float> x_rows(par.threads * kDirectRows * p.k);
  parallel_tasks(par, tasks, [&](int64_t task, int64_t worker) {
    const int64_t e = expert_of(first.data(), p.num_experts, task), rows = rows_of(e),
                  of_expert = task - first.data()[e];
    const T* x = all_x.data() + p.offsets[e] * all_x.stride();
    T* y = static_cast<T*>(p.y) + p.offsets[e] * p.n;
    Matrix<T> b{static_cast<const T*>(p.weight) + e * p.expert_stride, p.k_stride, p.n_stride};
    if (rows <= kDirectRows) {
      const int64_t j = of_expert * kDirectColumns;
      b.data += j * b.col_stride;
      multiply_few(rows, at_most(p.n - j, kDirectColumns), p.k, x, all_x.stride(), b, y + j, p.n,
                   x_rows.data() + worker * kDirectRows * p.k, workers.tile(worker));
      return;
    }
    const int64_t row_blocks = blocks(rows, kRowBlock);
    const int64_t r = of_expert % row_blocks * kRowBlock, j = of_expert / row_blocks * columns;
    b.data += j * b.col_stride;
    gemm_to(at_most(rows - r, kRowBlock), at_most(p.n - j, columns), p.k,
            Matrix<T>{x + r * all_x.stride(), all_x.stride(), 1}, b, y + r * p.n + j, p.n, workers.tile(worker),
            workers.packing(worker));
  });
}

// out[j][i] = sum_r dy[r][j] x[r][i] for `rows` <= kDirectRows: each row of out is written once, nothing is packed.
// `x_rows` holds kDirectRows * k floats.
template <class T>
void outer_products(int64_t rows, int64_t n, int64_t k, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                    T* out, int64_t out_stride, float* x_rows) {
  for (int64_t r = 0; r < kDirectRows; ++r)
    for (int64_t i = 0; i < k; ++i) x_rows[r * k + i] = r < rows ? to_float(x[r * x_stride + i]) : 0.f;
  for (int64_t j = 0; j < n; ++j) {
    vf d[kDirectRows];
    for (int64_t r = 0; r < kDirectRows; ++r) d[r] = set1(r < rows ? to_float(dy[r * dy_stride + j]) : 0.f);
    for_row(k, [&](int64_t i, auto lanes) {
      vf sum = d[0] * load_n(x_rows + i, lanes);
      for (int64_t r = 1; r < rows; ++r) sum = fma(d[r], load_n(x_rows + r * k + i, lanes), sum);
      store_n(out + j * out_stride + i, sum, lanes);
    });
  }
}

// The product, rounded where it is kept, then the gated linear unit of its halves.
template <class T>
void multiply_glu(const GroupedGluParams& g, const Parallel& par) {
  GroupedGemmParams p = g.product;
  const int64_t dim = p.n / 2;
  Scratch<T> own(p.y ? 0 : p.rows * p.n);
  if (!p.y) p.y = own.data();
  multiply<T>(p, par);
  parallel_ranges(par, p.rows, row_grain(dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *gate = static_cast<const T*>(p.y) + r * p.n, *up = gate + dim;
      T* out = static_cast<T*>(g.out) + r * dim;
      for_row(dim, [&](int64_t i, auto n) {
        const vf x = load_n(gate + i, n);
        store_n(out + i, (g.activation == Activation::silu ? Silu::value(x) : GeluTanh::value(x)) * load_n(up + i, n),
                n);
      });
    }
  });
}

template <class T>
void weight_grad(const GroupedGemmWeightGradParams& p, const Parallel& par) {
  const GatheredRows<T> all_x(p.x, p.x_stride, p.token_of, p.offsets[p.num_experts], p.k, par);
  const int64_t n_blocks = blocks(p.n, kRowBlock);
  const int64_t columns = column_block(p.num_experts * n_blocks, p.k, par.threads), k_blocks = blocks(p.k, columns);
  GemmWorkers workers(par.threads, kRowBlock * columns);
  parallel_tasks(par, p.num_experts * n_blocks * k_blocks, [&](int64_t task, int64_t worker) {
    const int64_t e = task / (n_blocks * k_blocks), begin = p.offsets[e];
    const int64_t j = task / k_blocks % n_blocks * kRowBlock, i = task % k_blocks * columns;
    const int64_t rows = p.offsets[e + 1] - begin, n = at_most(p.n - j, kRowBlock), k = at_most(p.k - i, columns);
    const T* dy = static_cast<const T*>(p.dy) + begin * p.dy_stride + j;
    const T* x = all_x.data() + begin * all_x.stride() + i;
    T* out = static_cast<T*>(p.dweight) + (e * p.n + j) * p.k + i;
    if (rows <= kDirectRows)
      outer_products(rows, n, k, dy, p.dy_stride, x, all_x.stride(), out, p.k, workers.tile(worker));
    else
      gemm_to(n, k, rows, Matrix<T>{dy, 1, p.dy_stride}, Matrix<T>{x, all_x.stride(), 1}, out, p.k,
              workers.tile(worker), workers.packing(worker));
  });
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, multiply<T>(p, par))
}

void grouped_glu(const GroupedGluParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.product.dtype, T, multiply_glu<T>(p, par))
}

void grouped_gemm_weight_grad(const GroupedGemmWeightGradParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, weight_grad<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
