#include "llmcore/grouped_gemm.h"

#include "common.h"
#include "llmcore/moe_permute.h"

namespace llmcore {
namespace {

const int32_t* int_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// One product per expert, checked. `op` begins the errors, `weight_name` names the weights in them.
struct Call {
  DType dtype;
  Rows x;                            // (rows, k), or (tokens, k)
  Tensor weight;                     // (num_experts, n, k), walked by its strides: n or k is contiguous
  Tensor offsets, token_of, row_of;  // the last two only when `gathers`
  bool gathers;
  int64_t rows, num_experts, n, k;

  const int32_t* tokens() const { return gathers ? int_data(token_of) : nullptr; }
};

// token_of (rows) and row_of (tokens, top_k) say the same of every assignment. On a CUDA device that is the caller's
// word.
void check_assignments(const Tensor& token_of, const Tensor& row_of, const std::string& op) {
  const int64_t rows = token_of.numel(), top_k = row_of.size(1);
  std::vector<bool> seen(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = int_data(row_of)[i], token = i / top_k;
    LLMCORE_CHECK(row >= 0 && row < rows, op, ": row_of[", token, ", ", i % top_k, "] is ", row, "; accepted: 0 to ",
                  rows - 1);
    LLMCORE_CHECK(!seen[row], op, ": row_of[", token, ", ", i % top_k, "] is ", row,
                  ", which an earlier assignment holds; the rows must be a permutation");
    seen[row] = true;
    LLMCORE_CHECK(int_data(token_of)[row] == token, op, ": token_of[", row, "] is ", int_data(token_of)[row],
                  ", but row_of says that row ", row, " is token ", token, "'s");
  }
}

Call checked(const Tensor& x, const Tensor& weight, const Tensor& offsets, const OptTensor& token_of,
             const OptTensor& row_of, const std::string& op, const char* weight_name, bool k_contiguous) {
  Call c{};
  const std::string x_name = op + ": x", w_name = op + ": " + weight_name, offsets_name = op + ": offsets";
  c.dtype = float_dtype(x, x_name.c_str());
  check_dim(x, 2, x_name.c_str(), token_of ? "(tokens, k)" : "(rows, k)");
  check_device(weight, x, w_name.c_str());
  check_same_dtype(weight, x, w_name.c_str(), "x");
  check_dim(weight, 3, w_name.c_str(), "(num_experts, n, k)");
  LLMCORE_CHECK(weight.size(0) >= 1, w_name, " has shape ", shape_text(weight), "; there must be an expert");
  const bool walks = weight.stride(2) == 1 || (weight.stride(1) == 1 && !k_contiguous);
  c.weight = walks ? weight : torch::stable::contiguous(weight);
  c.num_experts = weight.size(0), c.n = weight.size(1), c.k = weight.size(2);
  LLMCORE_CHECK(x.size(1) == c.k, x_name, " has shape ", shape_text(x), ", but ", weight_name, " has shape ",
                shape_text(weight), "; their last dimensions must be equal");
  c.x = as_rows(x);
  c.rows = x.size(0);
  c.gathers = token_of.has_value();
  LLMCORE_CHECK(token_of.has_value() == row_of.has_value(), op,
                ": token_of and row_of go together; give both or neither");
  if (c.gathers) {
    const std::string token_name = op + ": token_of", row_name = op + ": row_of";
    check_device(*token_of, x, token_name.c_str());
    check_dtype(*token_of, ScalarType::Int, token_name.c_str());
    check_dim(*token_of, 1, token_name.c_str(), "(rows,)");
    check_device(*row_of, x, row_name.c_str());
    check_dtype(*row_of, ScalarType::Int, row_name.c_str());
    check_dim(*row_of, 2, row_name.c_str(), "(tokens, top_k)");
    c.rows = token_of->size(0);
    LLMCORE_CHECK(row_of->size(0) == x.size(0) && row_of->numel() == c.rows, row_name, " has shape ",
                  shape_text(*row_of), "; expected (", x.size(0), ", top_k) with one entry for each of token_of's ",
                  c.rows, " rows");
    c.token_of = dense(*token_of);
    c.row_of = dense(*row_of);
    if (x.is_cpu()) check_assignments(c.token_of, c.row_of, op);
  }
  check_shape(offsets, {c.num_experts + 1}, offsets_name.c_str());
  c.offsets = checked_offsets(offsets, x, c.rows, offsets_name.c_str(), c.gathers ? "token_of" : "x");
  return c;
}

GroupedGemmParams product_of(const Call& c, void* y) {
  const Tensor& w = c.weight;
  return {c.dtype,       c.rows,
          c.num_experts, c.n,
          c.k,           c.x.tensor.const_data_ptr(),
          c.x.stride,    w.const_data_ptr(),
          w.stride(0),   w.stride(2),
          w.stride(1),   int_data(c.offsets),
          c.tokens(),    y,
          nullptr};
}

void multiply(const Tensor& like, GroupedGemmParams p) { LLMCORE_RUN_WITH_WORKSPACE(grouped_gemm, like, p); }
void multiply_glu(const Tensor& like, GroupedGluParams p) { LLMCORE_RUN_WITH_WORKSPACE(grouped_glu, like, p); }

// The gradient of x: dy times the weights read the other way, then the sum over the rows of a token.
Tensor x_gradient(const Tensor& like, const Call& c, const Rows& dy) {
  Tensor dx = empty(like, {c.rows, c.k});
  const Tensor& w = c.weight;
  multiply(like, {c.dtype, c.rows, c.num_experts, c.k, c.n, dy.tensor.const_data_ptr(), dy.stride, w.const_data_ptr(),
                  w.stride(0), w.stride(1), w.stride(2), int_data(c.offsets), nullptr, dx.mutable_data_ptr(), nullptr});
  if (!c.gathers) return dx;
  const int64_t tokens = c.row_of.size(0);
  Tensor sum = empty(like, {tokens, c.k});
  const MoeGatherParams p{c.dtype,
                          tokens,
                          c.row_of.size(1),
                          c.k,
                          dx.const_data_ptr(),
                          c.k,
                          int_data(c.row_of),
                          nullptr,
                          sum.mutable_data_ptr()};
  LLMCORE_RUN(moe_gather, like, p);
  return sum;
}

Tensor weight_gradient(const Tensor& like, const Call& c, const Rows& dy) {
  Tensor dweight = empty(like, {c.num_experts, c.n, c.k});
  const GroupedGemmWeightGradParams p{c.dtype,
                                      c.num_experts,
                                      c.n,
                                      c.k,
                                      dy.tensor.const_data_ptr(),
                                      dy.stride,
                                      c.x.tensor.const_data_ptr(),
                                      c.x.stride,
                                      int_data(c.offsets),
                                      c.tokens(),
                                      dweight.mutable_data_ptr()};
  LLMCORE_RUN(grouped_gemm_weight_grad, like, p);
  return dweight;
}

std::tuple<Tensor, Tensor> gradients(const Tensor& like, const Call& c, const Tensor& dy, bool need_dx,
                                     bool need_dweight) {
  const Rows d = as_rows(dy);
  Tensor dx = need_dx ? x_gradient(like, c, d) : empty(like, {0});
  Tensor dweight = need_dweight ? weight_gradient(like, c, d) : empty(like, {0});
  return {dx, dweight};
}

Tensor grouped_gemm(const Tensor& x, const Tensor& weight, const Tensor& offsets, const OptTensor& token_of,
                    const OptTensor& row_of) {
  const Call c = checked(x, weight, offsets, token_of, row_of, "grouped_gemm", "weight", false);
  Tensor y = empty(x, {c.rows, c.n});
  multiply(x, product_of(c, y.mutable_data_ptr()));
  return y;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                 const Tensor& offsets, const OptTensor& token_of,
                                                 const OptTensor& row_of, bool need_dx, bool need_dweight) {
  const Call c = checked(x, weight, offsets, token_of, row_of, "grouped_gemm_backward", "weight", false);
  check_like(dy, x, {c.rows, c.n}, "grouped_gemm_backward: dy", "x");
  return gradients(x, c, dy, need_dx, need_dweight);
}

Activation activation_of(const std::string& name, const char* op) {
  if (name == "swiglu") return Activation::silu;
  if (name == "geglu") return Activation::gelu_tanh;
  fail(op, ": activation is '", name, "'; accepted: 'swiglu', 'geglu'");
}

Call checked_glu(const Tensor& x, const Tensor& gate_up, const Tensor& offsets, const OptTensor& token_of,
                 const OptTensor& row_of, const std::string& op) {
  const Call c = checked(x, gate_up, offsets, token_of, row_of, op, "gate_up", true);
  LLMCORE_CHECK(c.n % 2 == 0, op, ": gate_up has shape ", shape_text(gate_up),
                "; its second dimension holds the gate's rows and as many of the up projection");
  return c;
}

std::tuple<Tensor, Tensor> grouped_glu(const Tensor& x, const Tensor& gate_up, const Tensor& offsets,
                                       const OptTensor& token_of, const OptTensor& row_of,
                                       const std::string& activation, bool keep) {
  const Activation act = activation_of(activation, "grouped_glu");
  const Call c = checked_glu(x, gate_up, offsets, token_of, row_of, "grouped_glu");
  Tensor out = empty(x, {c.rows, c.n / 2}), kept = keep ? empty(x, {c.rows, c.n}) : empty(x, {0});
  multiply_glu(x, {product_of(c, keep ? kept.mutable_data_ptr() : nullptr), act, out.mutable_data_ptr(), nullptr});
  return {out, kept};
}

std::tuple<Tensor, Tensor> grouped_glu_backward(const Tensor& dout, const Tensor& kept, const Tensor& x,
                                                const Tensor& gate_up, const Tensor& offsets, const OptTensor& token_of,
                                                const OptTensor& row_of, const std::string& activation, bool need_dx,
                                                bool need_dgate_up) {
  const Activation act = activation_of(activation, "grouped_glu_backward");
  const Call c = checked_glu(x, gate_up, offsets, token_of, row_of, "grouped_glu_backward");
  const int64_t dim = c.n / 2;
  check_like(dout, x, {c.rows, dim}, "grouped_glu_backward: dout", "x");
  Tensor pre = kept;
  if (kept.dim() == 1) {  // nothing was kept
    pre = empty(x, {c.rows, c.n});
    multiply(x, product_of(c, pre.mutable_data_ptr()));
  }
  check_like(pre, x, {c.rows, c.n}, "grouped_glu_backward: kept", "x");
  const Rows d = as_rows(dout), gates = as_rows(pre);
  const int64_t half = dim * (c.dtype == DType::f32 ? 4 : 2);  // bytes
  const char* gate = static_cast<const char*>(gates.tensor.const_data_ptr());
  Tensor dpre = empty(x, {c.rows, c.n});
  char* dgate = static_cast<char*>(dpre.mutable_data_ptr());
  const GluBackwardParams p{c.dtype,  act,          c.rows,       dim,         d.tensor.const_data_ptr(),
                            d.stride, gate,         gates.stride, gate + half, gates.stride,
                            dgate,    dgate + half, c.n};
  if (dim > 0) LLMCORE_RUN(glu_backward, x, p);
  return gradients(x, c, dpre, need_dx, need_dgate_up);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward));
  m.impl("grouped_glu", TORCH_BOX(&grouped_glu));
  m.impl("grouped_glu_backward", TORCH_BOX(&grouped_glu_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
