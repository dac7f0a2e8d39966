// The CUDA kernels as one more instruction set of the CPU ops, "cuda_emulated": the bindings, and with them every test
// of the registry, reach the launchers in csrc/cuda, and those run on the emulator. Only in test builds
// (LLMCORE_EMULATE_CUDA).
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "llmcore/attention.h"
#include "llmcore/dyt.h"
#include "llmcore/glu.h"
#include "llmcore/grouped_gemm.h"
#include "llmcore/kv_cache_write.h"
#include "llmcore/linear_cross_entropy.h"
#include "llmcore/moe_permute.h"
#include "llmcore/moe_route.h"
#include "llmcore/norm.h"
#include "llmcore/rope.h"

namespace llmcore {
namespace cpu {
namespace cuda_emulated {
namespace {

const cuda::Device kDevice{nullptr, 3};  // few multiprocessors, so that small grids wrap around

void check(cuda::Status status, const char* kernel) {
  if (status) throw std::runtime_error(std::string(kernel) + " on the emulator: " + status);
}

}  // namespace

#define ON_THE_EMULATOR(kernel, Params) \
  void kernel(const Params& p, const Parallel&) { check(cuda::kernel(p, kDevice), #kernel); }
#define WITHOUT_CUDA_KERNEL(kernel, Params) \
  void kernel(const Params& p, const Parallel& par) { portable::kernel(p, par); }

ON_THE_EMULATOR(glu_forward, GluParams)
ON_THE_EMULATOR(glu_backward, GluBackwardParams)

WITHOUT_CUDA_KERNEL(attention_forward, AttentionParams)
WITHOUT_CUDA_KERNEL(dyt_forward, DytParams)
WITHOUT_CUDA_KERNEL(dyt_backward, DytBackwardParams)
WITHOUT_CUDA_KERNEL(grouped_gemm, GroupedGemmParams)
WITHOUT_CUDA_KERNEL(grouped_gemm_weight_grad, GroupedGemmWeightGradParams)
WITHOUT_CUDA_KERNEL(kv_cache_write, KvCacheWriteParams)
WITHOUT_CUDA_KERNEL(layer_norm_forward, NormParams)
WITHOUT_CUDA_KERNEL(layer_norm_backward, NormBackwardParams)
WITHOUT_CUDA_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)
WITHOUT_CUDA_KERNEL(moe_sort, MoeSortParams)
WITHOUT_CUDA_KERNEL(moe_scatter, MoeScatterParams)
WITHOUT_CUDA_KERNEL(moe_gather, MoeGatherParams)
WITHOUT_CUDA_KERNEL(moe_route_forward, MoeRouteParams)
WITHOUT_CUDA_KERNEL(moe_route_backward, MoeRouteBackwardParams)
WITHOUT_CUDA_KERNEL(rms_norm_forward, NormParams)
WITHOUT_CUDA_KERNEL(rms_norm_backward, NormBackwardParams)
WITHOUT_CUDA_KERNEL(rope, RopeParams)

// Workspaces come as device memory does, full of what was there before (here: NaN).
void attention_backward(const AttentionBackwardParams& p, const Parallel& par) {
  if (p.dtype == DType::f32) return portable::attention_backward(p, par);
  AttentionBackwardParams with_workspace = p;
  const size_t bytes = static_cast<size_t>(cuda::attention_backward_workspace(p, kDevice));
  const std::unique_ptr<void, decltype(&free)> workspace(malloc(bytes), &free);
  memset(workspace.get(), 0xff, bytes);
  with_workspace.workspace = workspace.get();
  check(cuda::attention_backward(with_workspace, kDevice), "attention_backward");
}

}  // namespace cuda_emulated
}  // namespace cpu
}  // namespace llmcore
