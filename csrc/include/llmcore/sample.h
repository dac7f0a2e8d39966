// Drawing tokens from logits, and the penalties on repetition that come before.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// Longer rows would overflow the fixed-point sums (sampling_math.h).
constexpr int64_t kMaxSampleVocab = int64_t{1} << 22;

// Per row: temperature, top-k, top-p, min-p, then a draw whose noise is a function of (seed, position, token) alone. A
// row that holds NaN or +inf or nothing but -inf gets token -1 and logprob NaN.
struct SampleParams {
  DType dtype;          // of logits
  int64_t rows, vocab;  // 1 <= vocab <= kMaxSampleVocab
  const void* logits;   // (rows, vocab)
  int64_t logits_stride;
  const float* temperature;  // (rows) finite, >= 0; below kGreedyTemperature: the largest logit
  const int64_t* top_k;      // (rows) below 1: off
  const float* top_p;        // (rows) from 1 on: off
  const float* min_p;        // (rows) 0 to 1
  const int64_t* seeds;      // (rows)
  const int64_t* positions;  // (rows)
  int64_t* tokens;           // (rows)
  float* logprobs;           // (rows) of the drawn token under log_softmax(logits)
};

// logits of the tokens that a row has seen, in place: repetition of those in the prompt or the output, frequency and
// presence of those in the output.
struct ApplyPenaltiesParams {
  DType dtype;  // of logits
  int64_t rows, vocab;
  void* logits;  // (rows, vocab)
  int64_t logits_stride;
  int64_t max_len;
  const int64_t* tokens;       // (rows, max_len) contiguous; those outside [0, vocab) are skipped
  const int64_t* prompt_lens;  // (rows) how many of the first tokens are the prompt's
  const float* repetition;     // (rows) > 0
  const float* presence;       // (rows)
  const float* frequency;      // (rows)
};

LLMCORE_CPU_KERNEL(sample, SampleParams)
LLMCORE_CPU_KERNEL(apply_penalties, ApplyPenaltiesParams)
LLMCORE_CUDA_KERNEL(sample, SampleParams)
LLMCORE_CUDA_KERNEL(apply_penalties, ApplyPenaltiesParams)

}  // namespace llmcore
