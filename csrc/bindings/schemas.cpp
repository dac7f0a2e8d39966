// Every op's schema on one page. What the arguments mean is documented in llmcore/ops/<op>.py.
#include "common.h"

STABLE_TORCH_LIBRARY(llmcore, m) {
  // window, softcap: 0 = none
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? block_mask, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, bool causal, int window, float scale, float softcap, int block_q, int block_k, "
      "bool deterministic) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? sinks, Tensor? block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int window, "
      "float scale, float softcap, int block_q, int block_k, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor kv_lens, "
      "Tensor? cu_seqlens_q, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, bool causal, int window, float scale, "
      "float softcap) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor z, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
}
