// Decode: the few new query rows of each sequence over a paged cache (attention_decode.cu, docs/cuda-decode.md).
#pragma once
#include "llmcore/attention.h"

namespace llmcore {
namespace cuda {

// Whether attention_decode takes the call. From the shapes, dtypes and addresses; nothing on the device is read.
bool attention_decode_serves(const AttentionParams& p, const Device& device);
// Bytes that p.workspace must hold for a call that is served.
int64_t attention_decode_workspace(const AttentionParams& p, const Device& device);
Status attention_decode(const AttentionParams& p, const Device& device);

}  // namespace cuda
}  // namespace llmcore
