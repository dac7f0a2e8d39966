// Attention of few queries over many keys: a step of generation, a short chunk of a prompt.
#pragma once
#include "attention_tile.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// The sequences of a call for which decodes() holds; the others are not touched.
void attention_decode(const AttentionParams& p, const Parallel& par);

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
