#include "attention_calls.h"

using namespace llmcore;
using namespace races;

// dense and packed, on out and lse of the CPU's forward pass.
RACE_CASE(attention_backward) {
  constexpr int64_t kHeads = 2, kKvHeads = 1, kSeqQ = 70, kSeqK = 133, kDim = 64;
  const std::vector<int32_t> cu_q = {0, 3, 3, kSeqQ}, cu_k = {0, 20, 21, kSeqK};
  for (DType dtype : kHalves)
    for (bool packed : {false, true}) {
      const Tensor q = random_normal(dtype, kSeqQ * kHeads * kDim), k = random_normal(dtype, kSeqK * kKvHeads * kDim),
                   v = random_normal(dtype, k.size()), dout = random_normal(dtype, q.size()),
                   dlse = random_normal(DType::f32, kHeads * kSeqQ), sinks = random_normal(DType::f32, kHeads);
      Tensor out(dtype, q.size()), lse(DType::f32, kHeads * kSeqQ);
      AttentionParams f{};
      f.shape = dense_shape(1, kHeads, kKvHeads, kDim, kDim, kSeqQ, kSeqK);
      if (packed) {
        f.shape.batch = 3;
        f.shape.seq_q = f.shape.seq_k = 0;
        f.shape.cu_q = cu_q.data();
        f.shape.cu_k = cu_k.data();
      }
      f.mask = causal_mask(kDim);
      f.mask.sinks = packed ? nullptr : sinks.as<float>();
      f.q_dtype = f.kv_dtype = dtype;
      f.q = q.data();
      f.k = k.data();
      f.v = v.data();
      f.q_strides = f.out_strides = packed_strides(kHeads, kDim);
      f.k_strides = f.v_strides = packed_strides(kKvHeads, kDim);
      f.out = out.data();
      f.lse = lse.as<float>();
      f.lse_head = kSeqQ;
      cpu::portable::attention_forward(f, kSerial);

      Tensor dq(dtype, q.size()), dk(dtype, k.size()), dv(dtype, v.size()),
          dsinks(DType::f32, f.mask.sinks ? f.shape.batch * kHeads : 0);
      AttentionBackwardParams p{};
      p.shape = f.shape;
      p.mask = f.mask;
      p.dtype = dtype;
      p.q = q.data();
      p.k = k.data();
      p.v = v.data();
      p.out = out.data();
      p.dout = dout.data();
      p.q_strides = p.out_strides = p.dout_strides = p.dq_strides = f.q_strides;
      p.k_strides = p.v_strides = p.dk_strides = p.dv_strides = f.k_strides;
      p.lse = lse.as<float>();
      p.dlse = dlse.as<float>();
      p.lse_head = kSeqQ;
      p.dq = dq.data();
      p.dk = dk.data();
      p.dv = dv.data();
      p.dsinks = f.mask.sinks ? dsinks.as<float>() : nullptr;
      for (bool deterministic : {false, true}) {
        p.deterministic = deterministic;
        const Tensor memory = workspace(cuda::attention_backward_workspace(p, kDevice));
        p.workspace = memory.data();
        check(packed ? "packed" : "dense", BOTH(attention_backward), p,
              {{"dq", dq}, {"dk", dk}, {"dv", dv}, {"dsinks", dsinks, true, 1e-2}});
      }
    }
}
