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
#include "llmcore/linear.h"
#include "llmcore/linear_cross_entropy.h"
#include "llmcore/moe_permute.h"
#include "llmcore/moe_route.h"
#include "llmcore/norm.h"
#include "llmcore/qk_norm_rope.h"
#include "llmcore/quantized_linear.h"
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

// The memory is malloc's, so that a sanitizer sees its ends; as large as the launcher asked for, and full of what was
// there before: NaN.
template <class Params>
void run_with_workspace(Params p, int64_t (*size)(const Params&, const cuda::Device&),
                        cuda::Status (*launch)(const Params&, const cuda::Device&), const char* kernel) {
  const size_t bytes = static_cast<size_t>(size(p, device()));
  std::unique_ptr<void, decltype(&free)> memory(bytes ? malloc(bytes) : nullptr, &free);
  if (memory) memset(memory.get(), 0xff, bytes);
  p.workspace = memory.get();
  check(launch(p, device()), kernel);
}

}  // namespace

#define ON_THE_EMULATOR(kernel, Params) \
  void kernel(const Params& p, const Parallel&) { check(cuda::kernel(p, device()), #kernel); }
#define WITH_WORKSPACE(kernel, Params)                                              \
  void kernel(const Params& p, const Parallel&) {                                   \
    run_with_workspace<Params>(p, cuda::kernel##_workspace, cuda::kernel, #kernel); \
  }
#define WITH_WORKSPACE_BUT_FLOATS(kernel, Params, dtype)                            \
  void kernel(const Params& p, const Parallel& par) {                               \
    if (dtype == DType::f32) return portable::kernel(p, par);                       \
    run_with_workspace<Params>(p, cuda::kernel##_workspace, cuda::kernel, #kernel); \
  }
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
ON_THE_EMULATOR(quantized_embedding, QuantizedEmbeddingParams)
ON_THE_EMULATOR(quantized_grouped_linear, QuantizedGroupedLinearParams)
ON_THE_EMULATOR(quantized_linear, QuantizedLinearParams)
ON_THE_EMULATOR(layer_norm_forward, NormParams)
ON_THE_EMULATOR(layer_norm_backward, NormBackwardParams)
WITHOUT_CUDA_KERNEL(linear, LinearParams)
WITHOUT_CUDA_KERNEL(pack_quantized, PackQuantizedParams)
WITHOUT_CUDA_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)
WITHOUT_CUDA_KERNEL(qk_norm_rope, QkNormRopeParams)
WITHOUT_CUDA_KERNEL(qk_norm_rope_backward, QkNormRopeBackwardParams)
ON_THE_EMULATOR(moe_scatter, MoeScatterParams)
ON_THE_EMULATOR(moe_gather, MoeGatherParams)
ON_THE_EMULATOR(moe_route_backward, MoeRouteBackwardParams)
ON_THE_EMULATOR(rms_norm_forward, NormParams)
ON_THE_EMULATOR(rms_norm_backward, NormBackwardParams)
ON_THE_EMULATOR(rope, RopeParams)
ON_THE_EMULATOR(sample, SampleParams)
ON_THE_EMULATOR(apply_penalties, ApplyPenaltiesParams)

WITH_WORKSPACE(moe_sort, MoeSortParams)
WITH_WORKSPACE(moe_route_forward, MoeRouteParams)
// Attention and grouped products have no CUDA kernel for float32.
WITH_WORKSPACE_BUT_FLOATS(attention_forward, AttentionParams, p.q_dtype)
WITH_WORKSPACE_BUT_FLOATS(attention_backward, AttentionBackwardParams, p.dtype)
WITH_WORKSPACE_BUT_FLOATS(grouped_gemm, GroupedGemmParams, p.dtype)
WITH_WORKSPACE_BUT_FLOATS(grouped_glu, GroupedGluParams, p.product.dtype)
void grouped_gemm_weight_grad(const GroupedGemmWeightGradParams& p, const Parallel& par) {
  if (p.dtype == DType::f32) return portable::grouped_gemm_weight_grad(p, par);
  check(cuda::grouped_gemm_weight_grad(p, device()), "grouped_gemm_weight_grad");
}

}  // namespace cuda_emulated
}  // namespace cpu
}  // namespace llmcore
