// Memory that a CUDA launcher asks for.
#pragma once
#include "common.h"

namespace llmcore {

// Sets p.workspace to as many bytes as CUDA's `size(p, device)` says, on `like`'s device: torch's allocator reuses them
// once the stream has passed the call that p is for. On the CPU there is none.
#ifdef LLMCORE_CUDA
#define LLMCORE_WORKSPACE(p, like, size) ::llmcore::with_workspace(p, like, cuda::size)
template <class Params>
Tensor with_workspace(Params& p, const Tensor& like, int64_t (*size)(const Params&, const cuda::Device&)) {
  if (like.is_cpu()) return like;
  Tensor memory = empty(like, {size(p, CudaCall(like).device())}, ScalarType::Byte);
  p.workspace = memory.mutable_data_ptr();
  return memory;
}
#else
#define LLMCORE_WORKSPACE(p, like, size) (static_cast<void>(p), like)
#endif

}  // namespace llmcore
