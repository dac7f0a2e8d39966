// Every op's schema on one page. What the arguments mean is documented in llmcore/ops/<op>.py.
#include "common.h"

STABLE_TORCH_LIBRARY(llmcore, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor z, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
}
