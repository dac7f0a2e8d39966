// Cross-entropy of a linear layer's logits that never holds the (tokens, vocab) logits.
#pragma once
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// logits = hidden weight^T, then softcap * tanh(logits / softcap) if softcap > 0; lse = logsumexp(logits);
// loss = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean(logits) + z_loss * lse^2.
// With dhidden or dweight, also the gradients of sum_t dloss[t] * loss[t]: from the logits of the same pass.
struct LinearCrossEntropyParams {
  DType dtype;            // of hidden, weight, dhidden, dweight
  int64_t count;          // tokens that count; the others are neither read nor written
  const int64_t* tokens;  // (count): their indices, ascending
  int64_t dim, vocab;     // >= 1
  float softcap, z_loss, label_smoothing;
  const void* hidden;  // (all tokens, dim)
  int64_t hidden_stride;
  const void* weight;  // (vocab, dim)
  int64_t weight_stride;
  const int64_t* targets;  // (all tokens), each counting one in [0, vocab)
  float* loss;             // (all tokens); null when lse is given
  float* lse;              // (all tokens): written beside loss, read without it
  const float* dloss;      // (all tokens), or null: dloss_of_all for every token
  float dloss_of_all;
  void* dhidden;  // (all tokens, dim), contiguous; or null
  void* dweight;  // (vocab, dim), contiguous; or null
};

LLMCORE_CPU_KERNEL_BF16(linear_cross_entropy, LinearCrossEntropyParams)

}  // namespace llmcore
