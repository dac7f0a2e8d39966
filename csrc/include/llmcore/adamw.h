// AdamW (Loshchilov and Hutter, arXiv 1711.05101) on a list of tensors, with clipping by a norm that is on the device.
#pragma once
#include <cmath>

#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

constexpr int64_t kAdamwTile = 8192;  // tensors are cut into tiles of this many elements, numbered through the list

struct AdamwTensor {
  int64_t size, first_tile;  // elements; the tiles of the tensors before this one
  void* weight;              // (size) of weight_dtype, written only; null where the master is the weight
  float* master;             // (size)
  const void* grad;          // (size) of grad_dtype
  float* exp_avg;            // (size)
  float* exp_avg_sq;         // (size)
  float* step;               // (1), the updates so far
};

// What the elements of one tensor are multiplied with. With grad = NaN the tensor is left as it is.
struct AdamwFactors {
  float grad, step_size, root, decay;
};

// With g = grad / divisor * min(1, max_norm / norm): exp_avg += (1 - beta1) (g - exp_avg), exp_avg_sq = beta2 *
// exp_avg_sq + (1 - beta2) g^2, step += 1, master -= lr * weight_decay * master + lr / (1 - beta1^step) * exp_avg /
// (sqrt(exp_avg_sq / (1 - beta2^step)) + eps), weight = master rounded. A norm that is not finite changes nothing.
struct AdamwParams {
  DType weight_dtype;          // f32: `weight` is null everywhere
  DType grad_dtype;            // f32 or weight_dtype
  int64_t count, tiles;        // tensors; their tiles in all
  const AdamwTensor* tensors;  // (count), in the host's memory
  AdamwFactors* factors;       // (count), need not be set
  const float* norm;           // (1), of grad / divisor; null for no clipping
  const float* lr_tensor;      // (1), which replaces lr; or null
  double lr, beta1, beta2, eps, weight_decay, divisor;
  double max_norm;  // 0: no clipping, but a norm that is not finite still stops the update
};

LLMCORE_CPU_KERNEL(adamw, AdamwParams)
LLMCORE_CUDA_KERNEL(adamw, AdamwParams)

#ifdef __CUDACC__
#define LLMCORE_HOST_DEVICE __host__ __device__
#else
#define LLMCORE_HOST_DEVICE
#endif

// Counts the update in `step`, unless the norm stops it. Static, so that each instruction set keeps its own copy.
LLMCORE_HOST_DEVICE static inline AdamwFactors adamw_factors(const AdamwParams& p, float* step) {
  double grad = 1 / p.divisor;
  if (p.norm) {
    const double norm = static_cast<double>(*p.norm);
    if (!(norm - norm == 0)) return {static_cast<float>(norm - norm), 0.f, 0.f, 0.f};  // inf - inf is NaN
    if (p.max_norm > 0 && norm > p.max_norm) grad *= p.max_norm / norm;
  }
  const double lr = p.lr_tensor ? static_cast<double>(*p.lr_tensor) : p.lr, t = static_cast<double>(*step += 1.f);
  return {static_cast<float>(grad), static_cast<float>(lr / (1 - ::pow(p.beta1, t))),
          static_cast<float>(1 / ::sqrt(1 - ::pow(p.beta2, t))), static_cast<float>(lr * p.weight_decay)};
}

}  // namespace llmcore
