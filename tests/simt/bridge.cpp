// The CUDA kernels as one more instruction set of the CPU ops, "cuda_emulated": the bindings, and with them every test
// of the registry, reach the launchers in csrc/cuda, and those run on the emulator. Only in test builds
// (LLMCORE_EMULATE_CUDA).
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "llmcore/adamw.h"
#include "llmcore/attention.h"
#include "llmcore/cross_entropy.h"
#include "llmcore/device_errors.h"
#include "llmcore/dyt.h"
#include "llmcore/global_norm.h"
#include "llmcore/glu.h"
#include "llmcore/grouped_gemm.h"
#include "llmcore/kv_cache_write.h"
#include "llmcore/linear_cross_entropy.h"
#include "llmcore/moe_permute.h"
#include "llmcore/moe_route.h"
#include "llmcore/norm.h"
#include "llmcore/rope.h"
#include "llmcore/sample.h"

namespace llmcore {
namespace cpu {
namespace cuda_emulated {
namespace {

cuda::Device device() {
  cuda::Device d{};
  cuda::describe(0, d);
  return d;
}

void check(cuda::Status status, const char* kernel) {
  if (status) throw std::runtime_error(std::string(kernel) + " on the emulator: " + status);
}

// malloc, so that a sanitizer sees its ends; as large as the launcher asked for, and full of what was there before:
// NaN.
std::unique_ptr<void, decltype(&free)> workspace_of(int64_t bytes) {
  std::unique_ptr<void, decltype(&free)> memory(bytes ? malloc(static_cast<size_t>(bytes)) : nullptr, &free);
  if (memory) memset(memory.get(), 0xff, static_cast<size_t>(bytes));
  return memory;
}

}  // namespace

#define ON_THE_EMULATOR(kernel, Params) \
  void kernel(const Params& p, const Parallel&) { check(cuda::kernel(p, device()), #kernel); }
#define WITHOUT_CUDA_KERNEL(kernel, Params) \
  void kernel(const Params& p, const Parallel& par) { portable::kernel(p, par); }

ON_THE_EMULATOR(adamw, AdamwParams)
ON_THE_EMULATOR(global_norm, GlobalNormParams)
ON_THE_EMULATOR(cross_entropy_chunk, CrossEntropyChunkParams)
ON_THE_EMULATOR(take_device_errors, TakeDeviceErrorsParams)
ON_THE_EMULATOR(glu_forward, GluParams)
ON_THE_EMULATOR(glu_backward, GluBackwardParams)

ON_THE_EMULATOR(dyt_forward, DytParams)
ON_THE_EMULATOR(dyt_backward, DytBackwardParams)
ON_THE_EMULATOR(kv_cache_write, KvCacheWriteParams)
ON_THE_EMULATOR(layer_norm_forward, NormParams)
ON_THE_EMULATOR(layer_norm_backward, NormBackwardParams)
WITHOUT_CUDA_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)
ON_THE_EMULATOR(moe_scatter, MoeScatterParams)
ON_THE_EMULATOR(moe_gather, MoeGatherParams)
ON_THE_EMULATOR(moe_route_backward, MoeRouteBackwardParams)
ON_THE_EMULATOR(rms_norm_forward, NormParams)
ON_THE_EMULATOR(rms_norm_backward, NormBackwardParams)
ON_THE_EMULATOR(rope, RopeParams)
ON_THE_EMULATOR(sample, SampleParams)
ON_THE_EMULATOR(apply_penalties, ApplyPenaltiesParams)

void moe_sort(const MoeSortParams& p, const Parallel&) {
  MoeSortParams with = p;
  const auto workspace = workspace_of(cuda::moe_sort_workspace(p, device()));
  with.workspace = workspace.get();
  check(cuda::moe_sort(with, device()), "moe_sort");
}
void moe_route_forward(const MoeRouteParams& p, const Parallel&) {
  MoeRouteParams with = p;
  const auto workspace = workspace_of(cuda::moe_route_workspace(p, device()));
  with.workspace = workspace.get();
  check(cuda::moe_route_forward(with, device()), "moe_route_forward");
}

// Attention in float32 has no CUDA kernel.
void attention_forward(const AttentionParams& p, const Parallel& par) {
  if (p.q_dtype == DType::f32) return portable::attention_forward(p, par);
  AttentionParams with = p;
  const auto workspace = workspace_of(cuda::attention_forward_workspace(p, device()));
  with.workspace = workspace.get();
  check(cuda::attention_forward(with, device()), "attention_forward");
}
void attention_backward(const AttentionBackwardParams& p, const Parallel& par) {
  if (p.dtype == DType::f32) return portable::attention_backward(p, par);
  AttentionBackwardParams with = p;
  const auto workspace = workspace_of(cuda::attention_backward_workspace(p, device()));
  with.workspace = workspace.get();
  check(cuda::attention_backward(with, device()), "attention_backward");
}

// Nor have grouped products.
void grouped_gemm(const GroupedGemmParams& p, const Parallel& par) {
  if (p.dtype == DType::f32) return portable::grouped_gemm(p, par);
  GroupedGemmParams with = p;
  const auto workspace = workspace_of(cuda::grouped_gemm_workspace(p, device()));
  with.workspace = workspace.get();
  check(cuda::grouped_gemm(with, device()), "grouped_gemm");
}
void grouped_glu(const GroupedGluParams& p, const Parallel& par) {
  if (p.product.dtype == DType::f32) return portable::grouped_glu(p, par);
  GroupedGluParams with = p;
  const auto workspace = workspace_of(cuda::grouped_glu_workspace(p, device()));
  with.product.workspace = workspace.get();
  check(cuda::grouped_glu(with, device()), "grouped_glu");
}
void grouped_gemm_weight_grad(const GroupedGemmWeightGradParams& p, const Parallel& par) {
  if (p.dtype == DType::f32) return portable::grouped_gemm_weight_grad(p, par);
  check(cuda::grouped_gemm_weight_grad(p, device()), "grouped_gemm_weight_grad");
}

}  // namespace cuda_emulated
}  // namespace cpu
}  // namespace llmcore
