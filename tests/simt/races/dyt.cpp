#include "llmcore/dyt.h"

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr int64_t kRows = kSumRows + 3;             // more than one block of partial sums
constexpr int64_t kBlocks = 2, kDims[] = {72, 37};  // 16 bytes at a time, and one by one

}  // namespace

RACE_CASE(dyt_forward) {
  for (DType dtype : kFloats)
    for (int64_t dim : kDims) {
      const Tensor x = random_normal(dtype, kRows * dim), alpha = random_normal(dtype, 1),
                   weight = random_normal(dtype, dim), bias = random_normal(dtype, dim);
      Tensor y(dtype, kRows * dim);
      const DytParams p{dtype, kRows, dim, x.data(), dim, alpha.data(), weight.data(), bias.data(), y.data()};
      check(name(dtype), BOTH(dyt_forward), p, {{"y", y}});
    }
}

RACE_CASE(dyt_backward) {
  for (DType dtype : kFloats)
    for (int64_t dim : kDims) {
      const Tensor dy = random_normal(dtype, kRows * dim), x = random_normal(dtype, kRows * dim),
                   alpha = random_normal(dtype, 1), weight = random_normal(dtype, dim);
      Tensor dx(dtype, kRows * dim), dalpha = Tensor::doubles(kBlocks), dweight(DType::f32, kBlocks * dim),
                                     dbias(DType::f32, kBlocks * dim);
      const DytBackwardParams p{dtype,
                                kRows,
                                dim,
                                dy.data(),
                                dim,
                                x.data(),
                                dim,
                                alpha.data(),
                                weight.data(),
                                dx.data(),
                                dalpha.as<double>(),
                                dweight.as<float>(),
                                dbias.as<float>()};
      check(name(dtype), BOTH(dyt_backward), p,
            {{"dx", dx}, {"dalpha", dalpha, true, 1e-4}, {"dweight", dweight, true}, {"dbias", dbias, true}});
    }
}
