#include "llmcore/grouped_gemm.h"

#include "activations.h"
#include "expert_tasks.h"
#include "few_rows.h"
#include "gemm_workers.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kRowBlock = kBlockM;  // of one task, at most: packed once for all its columns
constexpr int64_t kMinColumnBlock = 4 * kPanel, kMaxColumnBlock = 4 * kBlockN;  // of one task
constexpr int64_t kDirectRows = kFewRows;  // experts with so few rows read their weights once, unpacked
constexpr int64_t kDirectColumns = 1024;   // of one of their tasks, at most
constexpr int64_t kOuterRows = 8;          // experts with so few rows write their weights' gradient directly
constexpr int64_t kStreamBytes = 8 << 20;  // gradients of weights from here on don't stay in the caches anyway

LLMCORE_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
LLMCORE_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// Rows of a task: as many as possible, in blocks of about the same size.
int64_t row_block(int64_t rows) {
  return rows <= kRowBlock ? kRowBlock : round_up(blocks(rows, blocks(rows, kRowBlock)), kTileRows);
}

// Columns of a task: wide, unless the threads would then lack tasks. All of about the same width.
int64_t column_block(int64_t row_blocks, int64_t columns, int threads) {
  if (columns == 0) return kMinColumnBlock;
  int64_t parts = blocks(columns, kMaxColumnBlock);
  while (row_blocks * parts < 3 * threads && columns > kMinColumnBlock * parts) ++parts;
  return round_up(blocks(columns, parts), kPanel);
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
  const bool along_n = p.n_stride == 1 && p.k_stride != 1;
  const auto direct_columns = [&](int64_t rows) {
    int64_t block = along_n ? at_most(add_columns(rows), kDirectColumns) : kDirectColumns;
    while (block > 64 && all_row_blocks * blocks(p.n, block) < 3 * par.threads) block /= 2;
    return block;
  };
  bool any_gemm = false;
  const int64_t tasks = number_tasks(p.num_experts, first.data(), [&](int64_t e) -> int64_t {
    const int64_t rows = rows_of(e);
    any_gemm |= rows > kDirectRows;
    if (rows == 0) return 0;
    return rows <= kDirectRows ? blocks(p.n, direct_columns(rows))
                               : blocks(rows, row_block(rows)) * blocks(p.n, columns);
  });
  GemmWorkers workers(any_gemm ? par.threads : 0, kRowBlock * columns);
  parallel_tasks(par, tasks, [&](int64_t task, int64_t worker) {
    const int64_t e = expert_of(first.data(), p.num_experts, task), rows = rows_of(e),
                  of_expert = task - first.data()[e];
    const T* x = all_x.data() + p.offsets[e] * all_x.stride();
    T* y = static_cast<T*>(p.y) + p.offsets[e] * p.n;
    Matrix<T> b{static_cast<const T*>(p.weight) + e * p.expert_stride, p.k_stride, p.n_stride};
    if (rows <= kDirectRows) {
      const int64_t block = direct_columns(rows), j = of_expert * block, n = at_most(p.n - j, block);
      b.data += j * b.col_stride;
      if (along_n) return add_rows<T>(rows, n, p.k, x, all_x.stride(), b.data, b.row_stride, y + j, p.n);
      const PackedRows<T> packed(rows, p.k, [&](int64_t r) { return x + r * all_x.stride(); });
      return dot_product_rows<T>(n, p.k, packed, b.data, b.col_stride, nullptr, y + j, p.n);
    }
    const int64_t block = row_block(rows), row_blocks = blocks(rows, block);
    const int64_t r = of_expert % row_blocks * block, j = of_expert / row_blocks * columns;
    b.data += j * b.col_stride;
    gemm_to(at_most(rows - r, block), at_most(p.n - j, columns), p.k,
            Matrix<T>{x + r * all_x.stride(), all_x.stride(), 1}, b, y + r * p.n + j, p.n, workers.tile(worker),
            workers.packing(worker));
  });
}

// out[j][i] = sum_r dy[r][j] x[r][i] for `rows` <= kOuterRows: each row of out is written once, nothing is packed.
// `x_rows` holds rows * k floats.
template <class T>
void outer_products(int64_t rows, int64_t n, int64_t k, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                    T* out, int64_t out_stride, float* x_rows) {
  constexpr int kRows = 4;  // of out at a time, so that x is read less often
  for (int64_t r = 0; r < rows; ++r)
    for_row(k, [&](int64_t i, auto lanes) { store_n(x_rows + r * k + i, load_n(x + r * x_stride + i, lanes), lanes); });
  for (int64_t j = 0; j < n; j += kRows) {
    float d[kOuterRows][kRows];
    for (int64_t r = 0; r < rows; ++r)
      for (int q = 0; q < kRows; ++q) d[r][q] = j + q < n ? to_float(dy[r * dy_stride + j + q]) : 0.f;
    for_row(k, [&](int64_t i, auto lanes) {
      vf sum[kRows] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const vf xv = load_n(x_rows + r * k + i, lanes);
        for (int q = 0; q < kRows; ++q) sum[q] = fma(set1(d[r][q]), xv, sum[q]);
      }
      for (int q = 0; q < kRows && j + q < n; ++q) store_n(out + (j + q) * out_stride + i, sum[q], lanes);
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
  const int64_t n_block = row_block(p.n), n_blocks = blocks(p.n, n_block);
  const int64_t columns = column_block(p.num_experts * n_blocks, p.k, par.threads), k_blocks = blocks(p.k, columns);
  GemmWorkers workers(par.threads, kRowBlock * columns);
  const int64_t bytes = p.num_experts * p.n * p.k * sizeof(T);
  prefer_huge_pages(p.dweight, bytes);  // a new tensor in every step
  parallel_tasks(par, p.num_experts * n_blocks * k_blocks, [&](int64_t task, int64_t worker) {
    const int64_t e = task / (n_blocks * k_blocks), begin = p.offsets[e];
    const int64_t j = task / k_blocks % n_blocks * n_block, i = task % k_blocks * columns;
    const int64_t rows = p.offsets[e + 1] - begin, n = at_most(p.n - j, n_block), k = at_most(p.k - i, columns);
    const T* dy = static_cast<const T*>(p.dy) + begin * p.dy_stride + j;
    const T* x = all_x.data() + begin * all_x.stride() + i;
    T* out = static_cast<T*>(p.dweight) + (e * p.n + j) * p.k + i;
    if (rows == 0 && bytes >= kStreamBytes) {  // most of the gradient when there are few tokens
      for (int64_t row = 0; row < n; ++row) stream_zeros(out + row * p.k, k * sizeof(T));
      stream_fence();
    } else if (rows == 0)
      for (int64_t row = 0; row < n; ++row) __builtin_memset(out + row * p.k, 0, k * sizeof(T));
    else if (rows <= kOuterRows)
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
