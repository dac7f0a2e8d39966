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
  for (DType dtype : kHalves)
    for (int64_t dim : {64, 40}) {
      Call call{dtype, dim};
      AttentionParams p = call.forward(false);
      run("dense, causal", p, call.out, call.lse);
      p.mask.causal = false;
      p.mask.window = 50;
      p.mask.softcap = 5;
      p.mask.sinks = call.sinks.as<float>();
      run("dense, window, softcap, sinks", p, call.out, call.lse);
      run("packed, causal", call.forward(true), call.out, call.lse);
    }
}
