// Every op's schema on one page. What the arguments mean is documented in llmcore/ops/<op>.py.
#include "common.h"

STABLE_TORCH_LIBRARY(llmcore, m) {
  // window, softcap: 0 = none
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? position_bias, Tensor? block_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int window, float scale, float softcap, int block_q, "
      "int block_k, bool deterministic) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? sinks, Tensor? position_bias, Tensor? block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "bool causal, int window, float scale, float softcap, int block_q, int block_k, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dposition_bias)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor kv_lens, "
      "Tensor? cu_seqlens_q, Tensor? sinks, Tensor? position_bias, Tensor? k_scale, Tensor? v_scale, bool causal, "
      "int window, float scale, float softcap) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor z, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def(
      "moe_route(Tensor logits, int top_k, bool sigmoid, Tensor? bias, int num_groups, int topk_groups, "
      "bool renormalize, float scale) -> (Tensor weights, Tensor experts, Tensor scores, Tensor offsets, "
      "Tensor row_of, Tensor token_of)");
  m.def(
      "moe_route_backward(Tensor? dweights, Tensor? dscores, Tensor scores, Tensor experts, bool sigmoid, "
      "bool renormalize, float scale) -> Tensor dlogits");
  m.def("moe_sort(Tensor experts, int num_experts) -> (Tensor offsets, Tensor row_of, Tensor token_of)");
  m.def("moe_dispatch(Tensor x, Tensor experts, int num_experts) -> (Tensor x_sorted, Tensor offsets, Tensor row_of)");
  m.def("moe_dispatch_backward(Tensor dx_sorted, Tensor row_of) -> Tensor dx");
  m.def("moe_combine(Tensor y_sorted, Tensor weights, Tensor row_of) -> Tensor out");
  m.def(
      "moe_combine_backward(Tensor dout, Tensor y_sorted, Tensor weights, Tensor row_of) -> (Tensor dy_sorted, "
      "Tensor dweights)");
  m.def("grouped_gemm(Tensor x, Tensor weight, Tensor offsets, Tensor? token_of, Tensor? row_of) -> Tensor y");
  m.def(
      "grouped_gemm_backward(Tensor dy, Tensor x, Tensor weight, Tensor offsets, Tensor? token_of, Tensor? row_of, "
      "bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)");
  m.def(
      "grouped_glu(Tensor x, Tensor gate_up, Tensor offsets, Tensor? token_of, Tensor? row_of, str activation, "
      "bool keep) -> (Tensor out, Tensor kept)");
  m.def(
      "grouped_glu_backward(Tensor dout, Tensor kept, Tensor x, Tensor gate_up, Tensor offsets, Tensor? token_of, "
      "Tensor? row_of, str activation, bool need_dx, bool need_dgate_up) -> (Tensor dx, Tensor dgate_up)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
  m.def("quantized_linear(Tensor x, Tensor packed, str format, int out_features, Tensor? bias) -> Tensor y");
  m.def("quantized_linear_(Tensor(a!) y, Tensor x, Tensor packed, str format, Tensor? bias) -> ()");
  m.def("pack_quantized(Tensor blocks, str format) -> Tensor packed");
  m.def(
      "quantized_embedding(Tensor ids, Tensor packed, str format, int num_embeddings, int dim, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float softcap, "
      "float z_loss, float label_smoothing) -> (Tensor loss, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
      "int ignore_index, float softcap, float z_loss, float label_smoothing, bool need_dhidden, bool need_dweight) "
      "-> (Tensor dhidden, Tensor dweight)");
  m.def(
      "linear_cross_entropy_with_grad(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float softcap, "
      "float z_loss, float label_smoothing, bool mean, bool need_dhidden, bool need_dweight) "
      "-> (Tensor loss, Tensor dhidden, Tensor dweight)");
  // what the three are made of on a CUDA device (llmcore/ops/linear_cross_entropy_cuda.py)
  m.def(
      "linear_cross_entropy_check(str op, Tensor hidden, Tensor weight, Tensor targets, Tensor? dloss, Tensor? lse, "
      "float softcap, float z_loss, float label_smoothing) -> ()");
  m.def(
      "cross_entropy_chunk_(Tensor(a!) logits, Tensor targets, Tensor(b!)? loss, Tensor(c!) lse, Tensor? dloss, "
      "int first, int ignore_index, float softcap, float z_loss, float label_smoothing, str gradient) -> ()");
  m.def("take_device_errors_(Tensor(a!) out) -> ()");
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> "
      "(Tensor y, Tensor z, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("global_norm(Tensor[] tensors) -> Tensor");
  // masters: empty where the weights are float32; lr_tensor replaces lr; max_norm: 0 = no clipping
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor(b!)[] masters, Tensor[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor? norm, Tensor? lr_tensor, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, float divisor, float max_norm) -> ()");
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
  // cos and sin go together; without them nothing is rotated. Without a weight those heads have no norm
  m.def(
      "qk_norm_rope(Tensor qkv, int num_heads, int num_kv_heads, Tensor? cos, Tensor? sin, Tensor? positions, "
      "Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "qk_norm_rope_backward(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, int num_heads, int num_kv_heads, "
      "Tensor? cos, Tensor? sin, Tensor? positions, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved) "
      "-> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)");
  m.def(
      "qk_norm_rope_cache_write(Tensor qkv, int num_heads, int num_kv_heads, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? q_weight, Tensor? k_weight, "
      "float eps, bool interleaved, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> Tensor q");
  // what they refuse, for their CUDA side (llmcore/ops/qk_norm_rope_cuda.py)
  m.def(
      "qk_norm_rope_check(str op, Tensor qkv, int num_heads, int num_kv_heads, Tensor? cos, Tensor? sin, "
      "Tensor? positions, Tensor? q_weight, Tensor? k_weight, float eps) -> ()");
  m.def(
      "kv_cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
      "Tensor positions) -> (Tensor tokens, Tensor logprobs)");
  m.def(
      "apply_penalties_(Tensor(a!) logits, Tensor tokens, Tensor prompt_lens, Tensor repetition, Tensor presence, "
      "Tensor frequency) -> ()");
}
