#include "attention_calls.h"

using namespace llmcore;
using namespace races;

namespace {

void run(const char* label, AttentionParams p, Tensor& out, Tensor& lse) {
  const Tensor memory = workspace(cuda::attention_forward_workspace(p, kDevice));
  p.workspace = memory.data();
  check(label, BOTH(attention_forward), p, {{"out", out}, {"lse", lse, false, 2e-4}});
}

}  // namespace

RACE_CASE(attention_forward) {
  constexpr int64_t kHeads = 2, kKvHeads = 1, kSeqQ = 70, kSeqK = 133;
  for (DType dtype : kHalves)
    for (int64_t dim : {64, 40}) {
      const Tensor q = random_normal(dtype, kSeqQ * kHeads * dim), k = random_normal(dtype, kSeqK * kKvHeads * dim),
                   v = random_normal(dtype, k.size()), sinks = random_normal(DType::f32, kHeads);
      Tensor out(dtype, q.size()), lse(DType::f32, kHeads * kSeqQ);
      AttentionParams p{};
      p.shape = dense_shape(1, kHeads, kKvHeads, dim, dim, kSeqQ, kSeqK);
      p.mask = causal_mask(dim);
      p.q_dtype = p.kv_dtype = dtype;
      p.q = q.data();
      p.k = k.data();
      p.v = v.data();
      p.q_strides = p.out_strides = packed_strides(kHeads, dim);
      p.k_strides = p.v_strides = packed_strides(kKvHeads, dim);
      p.out = out.data();
      p.lse = lse.as<float>();
      p.lse_head = kSeqQ;
      run("dense, causal", p, out, lse);
      p.mask.causal = false;
      p.mask.window = 50;
      p.mask.softcap = 5;
      p.mask.sinks = sinks.as<float>();
      run("dense, window, softcap, sinks", p, out, lse);

      const std::vector<int32_t> cu_q = {0, 3, 3, kSeqQ}, cu_k = {0, 20, 21, kSeqK};
      p.mask = causal_mask(dim);
      p.shape.batch = 3;
      p.shape.seq_q = p.shape.seq_k = 0;
      p.shape.cu_q = cu_q.data();
      p.shape.cu_k = cu_k.data();
      run("packed, causal", p, out, lse);
    }
}
