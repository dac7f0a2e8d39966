#include "llmcore/adamw.h"

#include <limits>

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr int64_t kSizes[] = {kAdamwTile + 77, 0, 40};
constexpr int64_t kAll = kSizes[0] + kSizes[2], kPadding = 8;  // keeps the third tensor at a multiple of 16 bytes

void run(DType weight_dtype, DType grad_dtype, float norm_value, int64_t shift) {
  const int64_t n = kAll + kPadding + shift;
  const Tensor grad = random_normal(grad_dtype, n), old_master = random_normal(DType::f32, n),
               old_mean = random_normal(DType::f32, n), old_square = random_uniform(DType::f32, n, 0, 2);
  Tensor old_weight(weight_dtype, n), old_step(DType::f32, 3), norm(DType::f32, 1);
  old_weight.fill_bytes(0);
  for (int64_t i = 0; i < 3; ++i) old_step.set(i, static_cast<double>(4 * i));
  norm.set(0, norm_value);
  Tensor weight(weight_dtype, n), master(DType::f32, n), mean(DType::f32, n), square(DType::f32, n),
      step(DType::f32, 3), factors(DType::f32, 12);
  AdamwTensor list[3];
  int64_t at = shift, tiles = 0;
  for (int64_t i = 0; i < 3; ++i) {
    const auto place = [at](const Tensor& t) {
      return static_cast<void*>(t.as<char>() + at * (t.dtype() == DType::f32 ? 4 : 2));
    };
    const auto floats = [&](const Tensor& t) { return static_cast<float*>(place(t)); };
    list[i] = {kSizes[i],
               tiles,
               weight_dtype == DType::f32 ? nullptr : place(weight),
               floats(master),
               place(grad),
               floats(mean),
               floats(square),
               step.as<float>() + i};
    tiles += (kSizes[i] + kAdamwTile - 1) / kAdamwTile;
    at += (kSizes[i] + kPadding - 1) / kPadding * kPadding;
  }
  const AdamwParams p{
      weight_dtype, grad_dtype, 3,   tiles, list, factors.as<AdamwFactors>(), norm.as<float>(), nullptr, 0.01, 0.9,
      0.95,         1e-8,       0.1, 4.0,   1.0};
  check(name(weight_dtype), BOTH(adamw), p,
        {{"weight", weight, false, 0, &old_weight},
         {"master", master, false, 0, &old_master},
         {"exp_avg", mean, false, 0, &old_mean},
         {"exp_avg_sq", square, false, 0, &old_square},
         {"step", step, false, 0, &old_step}});
}

}  // namespace

RACE_CASE(adamw) {
  for (DType dtype : kFloats)
    for (DType grad_dtype : {DType::f32, dtype})
      for (int64_t shift : {0, 1}) run(dtype, grad_dtype, 2.f, shift);
  run(DType::bf16, DType::f32, std::numeric_limits<float>::infinity(), 0);
}
