#include "llmcore/glu.h"

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr int64_t kRows = 3;
constexpr Activation kActivations[] = {Activation::silu, Activation::gelu_tanh, Activation::gelu_erf};

}  // namespace

RACE_CASE(glu_forward) {
  for (DType dtype : kFloats)
    for (Activation activation : kActivations)
      for (int64_t dim : {72, 37}) {  // 16 bytes at a time, and one by one
        const Tensor gate_and_up = random_normal(dtype, kRows * 2 * dim);
        Tensor y(dtype, kRows * dim);
        const size_t half = dim * (dtype == DType::f32 ? 4 : 2);
        const GluParams p{dtype,   activation, kRows, dim, gate_and_up.data(), 2 * dim, gate_and_up.as<char>() + half,
                          2 * dim, y.data()};
        check(name(dtype), BOTH(glu_forward), p, {{"y", y}});
      }
}

RACE_CASE(glu_backward) {
  for (DType dtype : kFloats)
    for (Activation activation : kActivations)
      for (int64_t dim : {72, 37}) {
        const Tensor dy = random_normal(dtype, kRows * dim), gate = random_normal(dtype, kRows * dim),
                     up = random_normal(dtype, kRows * dim);
        Tensor dgate(dtype, kRows * dim), dup(dtype, kRows * dim);
        const GluBackwardParams p{dtype, activation, kRows, dim,          dy.data(),  dim, gate.data(),
                                  dim,   up.data(),  dim,   dgate.data(), dup.data(), dim};
        check(name(dtype), BOTH(glu_backward), p, {{"dgate", dgate}, {"dup", dup}});
      }
}
