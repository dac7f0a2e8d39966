#include "attention_calls.h"

using namespace llmcore;
using namespace races;

// Dense and packed, on out and lse of the CPU's forward pass; dQ by atomic additions of several CTAs, and without.
RACE_CASE(attention_backward) {
  for (DType dtype : kHalves)
    for (bool packed : {false, true}) {
      const Call call{dtype, 64};
      AttentionParams f = call.forward(packed);
      f.mask.sinks = packed ? nullptr : call.sinks.as<float>();
      cpu::portable::attention_forward(f, kSerial);

      const Tensor dout = random_normal(dtype, call.q.size()), dlse = random_normal(DType::f32, call.lse.size());
      Tensor dq(dtype, call.q.size()), dk(dtype, call.k.size()), dv(dtype, call.v.size()),
          dsinks(DType::f32, f.mask.sinks ? call.sinks.size() : 0);
      AttentionBackwardParams p{};
      p.shape = f.shape;
      p.mask = f.mask;
      p.dtype = dtype;
      p.q = f.q;
      p.k = f.k;
      p.v = f.v;
      p.out = f.out;
      p.dout = dout.data();
      p.q_strides = p.out_strides = p.dout_strides = p.dq_strides = f.q_strides;
      p.k_strides = p.v_strides = p.dk_strides = p.dv_strides = f.k_strides;
      p.lse = f.lse;
      p.dlse = dlse.as<float>();
      p.lse_head = f.lse_head;
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
