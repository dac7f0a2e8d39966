#include "llmcore/cross_entropy.h"

#include "case.h"
#include "llmcore/device_errors.h"

using namespace llmcore;
using namespace races;

namespace {

// A gradient of 16 bits fills half of each row of logits and leaves anything in the rest: what is compared is a copy.
struct Call {
  CrossEntropyChunkParams p;
  const Tensor* before;
  Tensor *logits, *gradient;

  void prepare() const { logits->copy_from(*before); }
  void take_gradient() const {
    const int64_t bytes = p.vocab * (p.gradient == DType::f32 ? 4 : 2);
    for (int64_t row = 0; p.dloss && row < p.rows; ++row)
      memcpy(gradient->as<char>() + row * bytes, p.logits + row * p.stride, bytes);
  }
};

cuda::Status on_emulator(const Call& call, const cuda::Device& device) {
  call.prepare();
  const cuda::Status status = cuda::cross_entropy_chunk(call.p, device);
  call.take_gradient();
  return status;
}
void on_cpu(const Call& call, const Parallel& par) {
  call.prepare();
  cpu::portable::cross_entropy_chunk(call.p, par);
  call.take_gradient();
}

// Two rows of one warp each would do; of a row that a CTA shares, three rounds (of 4096 logits) and a bit.
void run(DType dtype, int64_t vocab, bool with_loss, bool with_gradient, float softcap) {
  constexpr int64_t kRows = 4, kIgnored = -100;
  const int64_t stride = (vocab + 7) / 8 * 8, targets[kRows] = {vocab - 1, kIgnored, vocab, 0};
  const Tensor before = random_normal(DType::f32, kRows * stride), dloss = random_normal(DType::f32, kRows),
               given = random_uniform(DType::f32, kRows, 9, 10);
  Tensor logits(DType::f32, kRows * stride), gradient(dtype, with_gradient ? kRows * vocab : 0),
      loss(DType::f32, with_loss ? kRows : 0), lse(DType::f32, kRows);
  const CrossEntropyChunkParams p{dtype,
                                  kRows,
                                  vocab,
                                  stride,
                                  0,
                                  kIgnored,
                                  softcap,
                                  1e-2f,
                                  0.1f,
                                  logits.as<float>(),
                                  targets,
                                  with_loss ? loss.as<float>() : nullptr,
                                  lse.as<float>(),
                                  with_gradient ? dloss.as<float>() : nullptr,
                                  1};
  const Output of_lse{"lse", lse, false, 0, with_loss ? nullptr : &given};
  check(name(dtype), on_emulator, on_cpu, Call{p, &before, &logits, &gradient},
        {{"loss", loss}, of_lse, {"gradient", gradient}});
}

}  // namespace

RACE_CASE(cross_entropy_chunk) {
  for (int64_t vocab : {300, 3 * 4096 + 21}) {
    run(DType::f32, vocab, true, false, 0.f);
    for (DType dtype : kFloats) {
      run(dtype, vocab, true, true, 0.f);
      run(dtype, vocab, false, true, 5.f);
    }
  }
}

RACE_CASE(take_device_errors) {
  Tensor out = Tensor::doubles(TakeDeviceErrorsParams::kKinds * TakeDeviceErrorsParams::kFields);  // 64-bit zeros
  check("empty", BOTH(take_device_errors), TakeDeviceErrorsParams{out.as<int64_t>()}, {{"out", out}});
}
