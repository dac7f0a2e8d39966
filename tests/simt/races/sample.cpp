#include "llmcore/sample.h"

#include <cmath>

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

Tensor filled(std::initializer_list<double> values) {
  Tensor t(DType::f32, static_cast<int64_t>(values.size()));
  int64_t i = 0;
  for (double x : values) t.set(i++, x);
  return t;
}

}  // namespace

// The rows: every filter, with ties at its threshold (logits are rounded); none; greedy; one that holds NaN.
RACE_CASE(sample) {
  constexpr int64_t kRows = 4;
  const Tensor temperature = filled({0.8, 1.5, 0, 1}), top_p = filled({0.7, 1, 1, 0.5}),
               min_p = filled({0.01, 0, 0, 0});
  const std::vector<int64_t> top_k = {40, 0, 0, 3}, seeds = {1, -2, 3, 4}, positions = {0, int64_t{5} << 40, 0, 0};
  for (DType dtype : kFloats)
    for (int64_t vocab : {600, 333}) {
      Tensor logits = random_normal(dtype, kRows * vocab);
      for (int64_t i = 0; i < logits.size(); ++i) logits.set(i, std::nearbyint(4 * logits.get(i)) / 2);
      logits.set(3 * vocab + 7, NAN);
      Tensor tokens(DType::f32, 2 * kRows), logprobs(DType::f32, kRows);
      const SampleParams p{dtype,
                           kRows,
                           vocab,
                           logits.data(),
                           vocab,
                           temperature.as<float>(),
                           top_k.data(),
                           top_p.as<float>(),
                           min_p.as<float>(),
                           seeds.data(),
                           positions.data(),
                           tokens.as<int64_t>(),
                           logprobs.as<float>()};
      // a token's eight bytes as floats: small integers are tiny numbers, and -1 is NaN
      check(name(dtype), BOTH(sample), p, {{"tokens", tokens, false, 1e-12}, {"logprobs", logprobs, false, 1e-12}});
    }
}

RACE_CASE(apply_penalties) {
  constexpr int64_t kRows = 2, kLen = 300;
  const Tensor repetition = filled({1.3, 0.8}), presence = filled({0.5, -0.2}), frequency = filled({0.1, 0.3});
  const std::vector<int64_t> prompt_lens = {120, 0};
  std::vector<int64_t> ids(kRows * kLen);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i * i % 97) - 1;
  for (DType dtype : kFloats) {
    constexpr int64_t kVocab = 8200;  // two parts
    const Tensor before = random_normal(dtype, kRows * kVocab);
    Tensor logits(dtype, kRows * kVocab);
    for (int64_t i = 0; i < kLen; i += 3) ids[i] = kVocab - 1 - i % 20;
    const ApplyPenaltiesParams p{dtype,
                                 kRows,
                                 kVocab,
                                 logits.data(),
                                 kVocab,
                                 kLen,
                                 ids.data(),
                                 prompt_lens.data(),
                                 repetition.as<float>(),
                                 presence.as<float>(),
                                 frequency.as<float>()};
    check(name(dtype), BOTH(apply_penalties), p, {{"logits", logits, false, 1e-12, &before}});
  }
}
