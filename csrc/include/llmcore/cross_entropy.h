// Cross-entropy of rows of logits, and their gradient in their place.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// The loss of a row is that of linear_cross_entropy.h. A row whose target is ignore_index has loss 0, lse 0 and
// gradient 0; one whose target is outside the vocabulary has loss NaN, lse 0 and gradient 0. The logits of such rows
// are not read.
struct CrossEntropyChunkParams {
  DType gradient;       // dtype of the gradient
  int64_t rows, vocab;  // vocab >= 1
  int64_t stride;       // of the rows, in floats: a multiple of 8, at least vocab
  int64_t first;        // index of row 0 among all tokens, for the record of errors
  int64_t ignore_index;
  float softcap, z_loss, label_smoothing;
  float* logits;           // (rows, vocab), aligned to 16 bytes; the gradient replaces them, from the start of each row
  const int64_t* targets;  // (rows)
  float* loss;             // (rows); null when lse is given
  float* lse;              // (rows): written beside loss, read without it
  const float* dloss;      // (rows) or one for all; null: no gradient
  int64_t dloss_stride;    // 1 or 0
};

LLMCORE_CPU_KERNEL(cross_entropy_chunk, CrossEntropyChunkParams)
LLMCORE_CUDA_KERNEL(cross_entropy_chunk, CrossEntropyChunkParams)

}  // namespace llmcore
