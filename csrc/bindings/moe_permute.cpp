#include "llmcore/moe_permute.h"

#include "common.h"

namespace llmcore {
namespace {

// row_of as a dense (tokens, top_k) permutation of the sorted rows: each is held by exactly one assignment.
Tensor checked_rows(const Tensor& row_of, const char* what) {
  check_cpu(row_of, what);
  check_dtype(row_of, ScalarType::Int, what);
  check_dim(row_of, 2, what, "(tokens, top_k)");
  const Tensor dense_rows = dense(row_of);
  const int64_t n = row_of.numel(), top_k = row_of.size(1);
  const int32_t* rows = static_cast<const int32_t*>(dense_rows.const_data_ptr());
  std::vector<bool> seen(n);
  for (int64_t i = 0; i < n; ++i) {
    LLMCORE_CHECK(rows[i] >= 0 && rows[i] < n, what, "[", i / top_k, ", ", i % top_k, "] is ", rows[i],
                  "; accepted: 0 to ", n - 1);
    LLMCORE_CHECK(!seen[rows[i]], what, "[", i / top_k, ", ", i % top_k, "] is ", rows[i],
                  ", which an earlier assignment holds; the rows must be a permutation");
    seen[rows[i]] = true;
  }
  return dense_rows;
}

// (rows, dim) sorted rows that match row_of.
Rows checked_sorted(const Tensor& sorted, const Tensor& row_of, const char* what) {
  check_cpu(sorted, what);
  check_dim(sorted, 2, what, "(tokens * top_k, dim)");
  LLMCORE_CHECK(sorted.size(0) == row_of.numel(), what, " has shape ", shape_text(sorted), "; row_of ",
                shape_text(row_of), " asks for ", row_of.numel(), " rows");
  return as_rows(sorted);
}

Tensor checked_weights(const Tensor& weights, const Tensor& row_of, const char* what) {
  check_cpu(weights, what);
  check_dtype(weights, ScalarType::Float, what);
  check_shape(weights, {row_of.size(0), row_of.size(1)}, what);
  return dense(weights);
}

const int32_t* int_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
const float* float_data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> moe_dispatch(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  const DType dtype = float_dtype(x, "moe_dispatch: x");
  check_dim(x, 2, "moe_dispatch: x", "(tokens, dim)");
  check_cpu(experts, "moe_dispatch: experts");
  check_dtype(experts, ScalarType::Int, "moe_dispatch: experts");
  check_dim(experts, 2, "moe_dispatch: experts", "(tokens, top_k)");
  const int64_t tokens = x.size(0), dim = x.size(1), top_k = experts.size(1), rows = tokens * top_k;
  LLMCORE_CHECK(experts.size(0) == tokens, "moe_dispatch: experts has shape ", shape_text(experts), ", but x has ",
                tokens, " tokens");
  LLMCORE_CHECK(num_experts >= 1, "moe_dispatch: num_experts is ", num_experts, "; it must be at least 1");
  LLMCORE_CHECK(rows <= INT32_MAX, "moe_dispatch: ", tokens, " tokens x ", top_k, " experts are ", rows,
                " rows; at most 2147483647 can be addressed");
  const Tensor e = dense(experts);
  const int32_t* ids = int_data(e);
  for (int64_t i = 0; i < rows; ++i)
    LLMCORE_CHECK(ids[i] >= 0 && ids[i] < num_experts, "moe_dispatch: experts[", i / top_k, ", ", i % top_k, "] is ",
                  ids[i], "; accepted: 0 to ", num_experts - 1);
  Tensor x_sorted = empty(x, {rows, dim});
  Tensor offsets = empty(x, {num_experts + 1}, ScalarType::Int), row_of = empty(x, {tokens, top_k}, ScalarType::Int);
  const Parallel par = torch_parallel();
  cpu::moe_sort({rows, num_experts, ids, static_cast<int32_t*>(offsets.mutable_data_ptr()),
                 static_cast<int32_t*>(row_of.mutable_data_ptr())},
                par);
  const Rows x_rows = as_rows(x);
  cpu::moe_scatter({dtype, tokens, top_k, dim, x_rows.tensor.const_data_ptr(), x_rows.stride, int_data(row_of), nullptr,
                    x_sorted.mutable_data_ptr(), nullptr, 0, nullptr},
                   par);
  return {x_sorted, offsets, row_of};
}

Tensor moe_dispatch_backward(const Tensor& dx_sorted, const Tensor& row_of) {
  const DType dtype = float_dtype(dx_sorted, "moe_dispatch_backward: dx_sorted");
  const Tensor rows = checked_rows(row_of, "moe_dispatch_backward: row_of");
  const Rows sorted = checked_sorted(dx_sorted, row_of, "moe_dispatch_backward: dx_sorted");
  const int64_t tokens = row_of.size(0), dim = dx_sorted.size(1);
  Tensor dx = empty(dx_sorted, {tokens, dim});
  cpu::moe_gather({dtype, tokens, row_of.size(1), dim, sorted.tensor.const_data_ptr(), sorted.stride, int_data(rows),
                   nullptr, dx.mutable_data_ptr()},
                  torch_parallel());
  return dx;
}

Tensor moe_combine(const Tensor& y_sorted, const Tensor& weights, const Tensor& row_of) {
  const DType dtype = float_dtype(y_sorted, "moe_combine: y_sorted");
  const Tensor rows = checked_rows(row_of, "moe_combine: row_of");
  const Rows sorted = checked_sorted(y_sorted, row_of, "moe_combine: y_sorted");
  const Tensor w = checked_weights(weights, row_of, "moe_combine: weights");
  const int64_t tokens = row_of.size(0), dim = y_sorted.size(1);
  Tensor out = empty(y_sorted, {tokens, dim});
  cpu::moe_gather({dtype, tokens, row_of.size(1), dim, sorted.tensor.const_data_ptr(), sorted.stride, int_data(rows),
                   float_data(w), out.mutable_data_ptr()},
                  torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& dout, const Tensor& y_sorted, const Tensor& weights,
                                                const Tensor& row_of) {
  const DType dtype = float_dtype(y_sorted, "moe_combine_backward: y_sorted");
  const Tensor rows = checked_rows(row_of, "moe_combine_backward: row_of");
  const Rows sorted = checked_sorted(y_sorted, row_of, "moe_combine_backward: y_sorted");
  const Tensor w = checked_weights(weights, row_of, "moe_combine_backward: weights");
  const int64_t tokens = row_of.size(0), top_k = row_of.size(1), dim = y_sorted.size(1);
  check_cpu(dout, "moe_combine_backward: dout");
  check_same_dtype(dout, y_sorted, "moe_combine_backward: dout", "y_sorted");
  check_shape(dout, {tokens, dim}, "moe_combine_backward: dout");
  const Rows d = as_rows(dout);
  Tensor dy = empty(y_sorted, {tokens * top_k, dim}), dweights = empty(weights, {tokens, top_k});
  cpu::moe_scatter({dtype, tokens, top_k, dim, d.tensor.const_data_ptr(), d.stride, int_data(rows), float_data(w),
                    dy.mutable_data_ptr(), sorted.tensor.const_data_ptr(), sorted.stride,
                    static_cast<float*>(dweights.mutable_data_ptr())},
                   torch_parallel());
  return {dy, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch));
  m.impl("moe_dispatch_backward", TORCH_BOX(&moe_dispatch_backward));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}

}  // namespace llmcore
