#include "llmcore/glu.h"

#include "common.h"

namespace llmcore {
namespace {

Activation gelu_form(const std::string& approximate) {
  if (approximate == "tanh") return Activation::gelu_tanh;
  if (approximate == "none") return Activation::gelu_erf;
  fail("geglu: approximate is '", approximate, "'; accepted: 'tanh', 'none'");
}

Tensor glu(const Tensor& gate, const Tensor& up, Activation activation, const char* op) {
  const std::string gate_name = std::string(op) + ": gate", up_name = std::string(op) + ": up";
  const DType dtype = float_dtype(gate, gate_name.c_str());
  check_same_shape(up, gate, up_name.c_str(), "gate");
  const Rows g = as_rows(gate), u = as_rows(up);
  Tensor y = empty_same_shape(gate);
  GluParams p{
      dtype,    activation,          g.rows, g.dim, g.tensor.const_data_ptr(), g.stride, u.tensor.const_data_ptr(),
      u.stride, y.mutable_data_ptr()};
  if (g.dim > 0) LLMCORE_RUN(glu_forward, gate, p);
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, Activation activation,
                                        const char* op) {
  const std::string gate_name = std::string(op) + ": gate", up_name = std::string(op) + ": up",
                    dy_name = std::string(op) + ": dy";
  const DType dtype = float_dtype(gate, gate_name.c_str());
  check_same_shape(up, gate, up_name.c_str(), "gate");
  check_same_shape(dy, gate, dy_name.c_str(), "gate");
  const Rows d = as_rows(dy), g = as_rows(gate), u = as_rows(up);
  Tensor dgate = empty_same_shape(gate), dup = empty_same_shape(up);
  GluBackwardParams p{dtype,
                      activation,
                      g.rows,
                      g.dim,
                      d.tensor.const_data_ptr(),
                      d.stride,
                      g.tensor.const_data_ptr(),
                      g.stride,
                      u.tensor.const_data_ptr(),
                      u.stride,
                      dgate.mutable_data_ptr(),
                      dup.mutable_data_ptr(),
                      g.dim};
  if (g.dim > 0) LLMCORE_RUN(glu_backward, gate, p);
  return {dgate, dup};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) { return glu(gate, up, Activation::silu, "swiglu"); }

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  return glu_backward(dy, gate, up, Activation::silu, "swiglu_backward");
}

Tensor geglu(const Tensor& gate, const Tensor& up, const std::string& approximate) {
  return glu(gate, up, gelu_form(approximate), "geglu");
}

std::tuple<Tensor, Tensor> geglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                          const std::string& approximate) {
  return glu_backward(dy, gate, up, gelu_form(approximate), "geglu_backward");
}

// gate_up holds gate and up side by side, and dgate_up their gradients: nothing is put together afterwards. act(gate) *
// up, which the weight's gradient needs, is computed once more.
std::tuple<Tensor, Tensor> glu_linear_backward(const Tensor& dact, const Tensor& gate_up,
                                               const std::string& activation) {
  const DType dtype = float_dtype(gate_up, "glu_linear_backward: gate_up");
  const bool silu = activation == "swiglu";
  LLMCORE_CHECK(silu || activation == "geglu", "glu_linear_backward: activation is '", activation,
                "'; accepted: 'swiglu', 'geglu'");
  const Activation act = silu ? Activation::silu : Activation::gelu_tanh;
  const Rows rows = as_rows(gate_up);
  LLMCORE_CHECK(rows.dim % 2 == 0, "glu_linear_backward: gate_up has shape ", shape_text(gate_up),
                "; the last dimension must be two halves");
  check_same_dtype(dact, gate_up, "glu_linear_backward: dact", "gate_up");
  check_device(dact, gate_up, "glu_linear_backward: dact");
  const Rows d = as_rows(dact);
  const int64_t dim = rows.dim / 2;
  LLMCORE_CHECK(d.dim == dim && d.rows == rows.rows, "glu_linear_backward: dact has shape ", shape_text(dact),
                ", but gate_up has ", shape_text(gate_up));
  Tensor y = empty_same_shape(dact), dgate_up = empty_same_shape(gate_up);
  if (dim == 0) return {y, dgate_up};
  const int64_t half = dim * (dtype == DType::f32 ? 4 : 2);  // bytes
  const char* gate = static_cast<const char*>(rows.tensor.const_data_ptr());
  char* dgate = static_cast<char*>(dgate_up.mutable_data_ptr());
  GluParams forward{dtype, act, rows.rows, dim, gate, rows.stride, gate + half, rows.stride, y.mutable_data_ptr()};
  LLMCORE_RUN(glu_forward, gate_up, forward);
  GluBackwardParams backward{dtype,    act,          rows.rows,   dim,         d.tensor.const_data_ptr(),
                             d.stride, gate,         rows.stride, gate + half, rows.stride,
                             dgate,    dgate + half, 2 * dim};
  LLMCORE_RUN(glu_backward, gate_up, backward);
  return {y, dgate_up};
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("glu_linear_backward", TORCH_BOX(&glu_linear_backward));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
