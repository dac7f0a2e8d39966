#include "llmcore/norm.h"

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr int64_t kRows = kSumRows + 3;             // more than one block of partial sums
constexpr int64_t kBlocks = 2, kDims[] = {72, 37};  // 16 bytes at a time, and one by one

template <bool Centred, class OnEmulator, class OnCpu>
void forward(OnEmulator on_emulator, OnCpu on_cpu) {
  for (DType dtype : kFloats)
    for (int64_t dim : kDims)
      for (bool with_residual : {false, true}) {
        const Tensor x = random_normal(dtype, kRows * dim), residual = random_normal(dtype, kRows * dim),
                     weight = random_normal(dtype, dim), bias = random_normal(dtype, dim);
        Tensor y(dtype, kRows * dim), z(dtype, with_residual ? kRows * dim : 0), mean(DType::f32, Centred ? kRows : 0),
            rstd(DType::f32, kRows);
        const NormParams p{dtype,
                           kRows,
                           dim,
                           1e-5f,
                           x.data(),
                           dim,
                           with_residual ? residual.data() : nullptr,
                           dim,
                           weight.data(),
                           Centred ? bias.data() : nullptr,
                           y.data(),
                           with_residual ? z.data() : nullptr,
                           Centred ? mean.as<float>() : nullptr,
                           rstd.as<float>()};
        check(name(dtype), on_emulator, on_cpu, p, {{"y", y}, {"z", z}, {"mean", mean}, {"rstd", rstd}});
      }
}

template <bool Centred, class OnEmulator, class OnCpu>
void backward(OnEmulator on_emulator, OnCpu on_cpu) {
  for (DType dtype : kFloats)
    for (int64_t dim : kDims)
      for (bool with_dz : {false, true}) {
        const Tensor dy = random_normal(dtype, kRows * dim), dz = random_normal(dtype, kRows * dim),
                     z = random_normal(dtype, kRows * dim), weight = random_normal(dtype, dim),
                     mean = random_normal(DType::f32, kRows), rstd = random_uniform(DType::f32, kRows, 0.5, 2);
        Tensor dx(dtype, kRows * dim), dweight(DType::f32, kBlocks * dim),
            dbias(DType::f32, Centred ? kBlocks * dim : 0);
        const NormBackwardParams p{dtype,
                                   kRows,
                                   dim,
                                   dy.data(),
                                   dim,
                                   with_dz ? dz.data() : nullptr,
                                   dim,
                                   z.data(),
                                   dim,
                                   weight.data(),
                                   Centred ? mean.as<float>() : nullptr,
                                   rstd.as<float>(),
                                   dx.data(),
                                   dweight.as<float>(),
                                   Centred ? dbias.as<float>() : nullptr};
        check(name(dtype), on_emulator, on_cpu, p, {{"dx", dx}, {"dweight", dweight, true}, {"dbias", dbias, true}});
      }
}

}  // namespace

RACE_CASE(rms_norm_forward) { forward<false>(BOTH(rms_norm_forward)); }
RACE_CASE(rms_norm_backward) { backward<false>(BOTH(rms_norm_backward)); }
RACE_CASE(layer_norm_forward) { forward<true>(BOTH(layer_norm_forward)); }
RACE_CASE(layer_norm_backward) { backward<true>(BOTH(layer_norm_backward)); }
