#include "llmcore/moe_permute.h"

#include "common.h"

namespace llmcore {
namespace {

// row_of as a dense (tokens, top_k) permutation of the sorted rows: each is held by exactly one assignment, which is
// looked at on the CPU only.
Tensor checked_rows(const Tensor& row_of, const Tensor& like, const char* what) {
  check_device(row_of, like, what);
  check_dtype(row_of, ScalarType::Int, what);
  check_dim(row_of, 2, what, "(tokens, top_k)");
  const Tensor dense_rows = dense(row_of);
  if (!row_of.is_cpu()) return dense_rows;
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
  check_dim(sorted, 2, what, "(tokens * top_k, dim)");
  LLMCORE_CHECK(sorted.size(0) == row_of.numel(), what, " has shape ", shape_text(sorted), "; row_of ",
                shape_text(row_of), " asks for ", row_of.numel(), " rows");
  return as_rows(sorted);
}

Tensor checked_weights(const Tensor& weights, const Tensor& row_of, const char* what) {
  check_device(weights, row_of, what);
  check_dtype(weights, ScalarType::Float, what);
  check_shape(weights, {row_of.size(0), row_of.size(1)}, what);
  return dense(weights);
}

// experts as dense (tokens, top_k) ids, which are looked at on the CPU only.
Tensor checked_experts(const Tensor& experts, int64_t num_experts, const std::string& op) {
  const std::string what = op + ": experts";
  check_dtype(experts, ScalarType::Int, what.c_str());
  check_dim(experts, 2, what.c_str(), "(tokens, top_k)");
  const int64_t tokens = experts.size(0), top_k = experts.size(1), rows = tokens * top_k;
  LLMCORE_CHECK(num_experts >= 1, op, ": num_experts is ", num_experts, "; it must be at least 1");
  LLMCORE_CHECK(num_experts < INT32_MAX, op, ": num_experts is ", num_experts, "; at most 2147483646 can be addressed");
  LLMCORE_CHECK(rows <= INT32_MAX, op, ": ", tokens, " tokens x ", top_k, " experts are ", rows,
                " rows; at most 2147483647 can be addressed");
  const Tensor e = dense(experts);
  if (!e.is_cpu()) return e;
  const int32_t* ids = static_cast<const int32_t*>(e.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    LLMCORE_CHECK(ids[i] >= 0 && ids[i] < num_experts, op, ": experts[", i / top_k, ", ", i % top_k, "] is ", ids[i],
                  "; accepted: 0 to ", num_experts - 1);
  return e;
}

const int32_t* int_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
int32_t* new_int_data(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
const float* float_data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Sorts checked experts into offsets, row_of and, where it is not null, token_of.
void sort_experts(const Tensor& experts, int64_t num_experts, const Tensor& offsets, const Tensor& row_of,
                  int32_t* token_of) {
  MoeSortParams p{experts.size(0),       experts.size(1),      num_experts, int_data(experts),
                  new_int_data(offsets), new_int_data(row_of), token_of,    nullptr};
  LLMCORE_RUN_WITH_WORKSPACE(moe_sort, experts, p);
}

std::tuple<Tensor, Tensor, Tensor> moe_sort(const Tensor& experts, int64_t num_experts) {
  const Tensor e = checked_experts(experts, num_experts, "moe_sort");
  Tensor offsets = empty(e, {num_experts + 1}), row_of = empty(e, {e.size(0), e.size(1)}),
         token_of = empty(e, {e.numel()});
  sort_experts(e, num_experts, offsets, row_of, new_int_data(token_of));
  return {offsets, row_of, token_of};
}

std::tuple<Tensor, Tensor, Tensor> moe_dispatch(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  const DType dtype = float_dtype(x, "moe_dispatch: x");
  check_dim(x, 2, "moe_dispatch: x", "(tokens, dim)");
  check_device(experts, x, "moe_dispatch: experts");
  const Tensor e = checked_experts(experts, num_experts, "moe_dispatch");
  const int64_t tokens = e.size(0), top_k = e.size(1), dim = x.size(1);
  LLMCORE_CHECK(x.size(0) == tokens, "moe_dispatch: experts has shape ", shape_text(e), ", but x has ", x.size(0),
                " tokens");
  Tensor x_sorted = empty(x, {tokens * top_k, dim});
  Tensor offsets = empty(e, {num_experts + 1}), row_of = empty(e, {tokens, top_k});
  sort_experts(e, num_experts, offsets, row_of, nullptr);
  const Rows x_rows = as_rows(x);
  const MoeScatterParams p{dtype,
                           tokens,
                           top_k,
                           dim,
                           x_rows.tensor.const_data_ptr(),
                           x_rows.stride,
                           int_data(row_of),
                           nullptr,
                           x_sorted.mutable_data_ptr(),
                           nullptr,
                           0,
                           nullptr};
  LLMCORE_RUN(moe_scatter, x, p);
  return {x_sorted, offsets, row_of};
}

// (tokens, dim) out of sorted rows; without weights, all are 1.
Tensor gather(DType dtype, const Rows& sorted, const Tensor& row_of, const float* weights) {
  Tensor out = empty(sorted.tensor, {row_of.size(0), sorted.tensor.size(1)});
  const MoeGatherParams p{
      dtype,         row_of.size(0),   row_of.size(1), out.size(1),           sorted.tensor.const_data_ptr(),
      sorted.stride, int_data(row_of), weights,        out.mutable_data_ptr()};
  LLMCORE_RUN(moe_gather, sorted.tensor, p);
  return out;
}

Tensor moe_dispatch_backward(const Tensor& dx_sorted, const Tensor& row_of) {
  const DType dtype = float_dtype(dx_sorted, "moe_dispatch_backward: dx_sorted");
  const Tensor rows = checked_rows(row_of, dx_sorted, "moe_dispatch_backward: row_of");
  return gather(dtype, checked_sorted(dx_sorted, row_of, "moe_dispatch_backward: dx_sorted"), rows, nullptr);
}

Tensor moe_combine(const Tensor& y_sorted, const Tensor& weights, const Tensor& row_of) {
  const DType dtype = float_dtype(y_sorted, "moe_combine: y_sorted");
  const Tensor rows = checked_rows(row_of, y_sorted, "moe_combine: row_of");
  const Rows sorted = checked_sorted(y_sorted, row_of, "moe_combine: y_sorted");
  const Tensor w = checked_weights(weights, row_of, "moe_combine: weights");
  return gather(dtype, sorted, rows, float_data(w));
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& dout, const Tensor& y_sorted, const Tensor& weights,
                                                const Tensor& row_of) {
  const DType dtype = float_dtype(y_sorted, "moe_combine_backward: y_sorted");
  const Tensor rows = checked_rows(row_of, y_sorted, "moe_combine_backward: row_of");
  const Rows sorted = checked_sorted(y_sorted, row_of, "moe_combine_backward: y_sorted");
  const Tensor w = checked_weights(weights, row_of, "moe_combine_backward: weights");
  const int64_t tokens = row_of.size(0), top_k = row_of.size(1), dim = y_sorted.size(1);
  check_like(dout, y_sorted, {tokens, dim}, "moe_combine_backward: dout", "y_sorted");
  const Rows d = as_rows(dout);
  Tensor dy = empty(y_sorted, {tokens * top_k, dim}), dweights = empty(weights, {tokens, top_k});
  const MoeScatterParams p{dtype,
                           tokens,
                           top_k,
                           dim,
                           d.tensor.const_data_ptr(),
                           d.stride,
                           int_data(rows),
                           float_data(w),
                           dy.mutable_data_ptr(),
                           sorted.tensor.const_data_ptr(),
                           sorted.stride,
                           static_cast<float*>(dweights.mutable_data_ptr())};
  LLMCORE_RUN(moe_scatter, y_sorted, p);
  return {dy, dweights};
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch));
  m.impl("moe_dispatch_backward", TORCH_BOX(&moe_dispatch_backward));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
