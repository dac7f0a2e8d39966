// Every op's schema on one page. What the arguments mean is documented in llmcore/ops/<op>.py.
#include "common.h"

STABLE_TORCH_LIBRARY(llmcore, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor z, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> "
      "(Tensor y, Tensor z, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("dyt(Tensor x, Tensor alpha, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "dyt_backward(Tensor dy, Tensor x, Tensor alpha, Tensor weight, bool has_bias) -> "
      "(Tensor dx, Tensor dalpha, Tensor dweight, Tensor dbias)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def("geglu(Tensor gate, Tensor up, str approximate) -> Tensor");
  m.def("geglu_backward(Tensor dy, Tensor gate, Tensor up, str approximate) -> (Tensor dgate, Tensor dup)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor");
  m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> ()");
  m.def(
      "kv_cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()");
}
