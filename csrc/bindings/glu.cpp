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

template <class Library>
void register_kernels(Library& m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
