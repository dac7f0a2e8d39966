// The CUDA kernels as one more instruction set of the CPU ops, "cuda_emulated": the bindings, and with them every test
// of the registry, reach the launchers in csrc/cuda, and those run on the emulator. Only in test builds
// (LLMCORE_EMULATE_CUDA).
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "attention_decode.cuh"
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

// What a launcher finds in a workspace is whatever was there before: NaN, here.
struct Workspace {
  std::unique_ptr<void, decltype(&std::free)> memory;
  explicit Workspace(int64_t bytes) : memory(std::malloc(static_cast<size_t>(bytes)), std::free) {
    if (bytes && !memory) throw std::bad_alloc();
    if (bytes) std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));
  }
};

}  // namespace

#define ON_THE_EMULATOR(kernel, Params) \
  void kernel(const Params& p, const Parallel&) { check(cuda::kernel(p, kDevice), #kernel); }
#define WITHOUT_CUDA_KERNEL(kernel, Params) \
  void kernel(const Params& p, const Parallel& par) { portable::kernel(p, par); }

ON_THE_EMULATOR(glu_forward, GluParams)
ON_THE_EMULATOR(glu_backward, GluBackwardParams)

void attention_forward(const AttentionParams& p, const Parallel& par) {
  if (!cuda::attention_decode_serves(p)) return portable::attention_forward(p, par);
  const Workspace workspace(cuda::attention_decode_workspace(p, kDevice));
  AttentionParams with_workspace = p;
  with_workspace.workspace = workspace.memory.get();
  check(cuda::attention_decode(with_workspace, kDevice), "attention_decode");
}
WITHOUT_CUDA_KERNEL(attention_backward, AttentionBackwardParams)
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

}  // namespace cuda_emulated
}  // namespace cpu
}  // namespace llmcore
