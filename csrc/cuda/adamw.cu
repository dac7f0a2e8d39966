// AdamW. Bound by memory, over which it goes once: 16 bytes of master and moments and the gradient are read per
// element, 12 and the weight written. What depends on the step and the norm is computed on the device beforehand.
#include "llmcore/adamw.h"

#include "tensor_list.cuh"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;
using Part = TensorPart<AdamwTensor>;
static_assert(sizeof(Part) + sizeof(AdamwParams) <= 4096);  // the parameters of a kernel

struct Constants {
  float rate1, beta2, rate2, eps;  // 1 - beta1, beta2, 1 - beta2, eps
};

// Elements in the 16 bytes of the narrowest tensor, so that its accesses are 16 bytes too.
template <class W, class G>
constexpr int kWidth = sizeof(W) < sizeof(G) ? kVector<W> : kVector<G>;

// A thread per tensor of the part.
__global__ void __launch_bounds__(Part::kMost)
    prepare(const __grid_constant__ Part part, const __grid_constant__ AdamwParams p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < part.count) p.factors[part.first + i] = adamw_factors(p, part.tensors[i].step);
}

template <class W, class G, int Width>
PTX_DEVICE void update(const AdamwTensor& tensor, const AdamwFactors& factors, const Constants& c, int64_t i) {
  const auto grad = fetch<Width>(static_cast<const G*>(tensor.grad) + i);
  const Packed<float, Width> exp_avg = fetch<Width>(tensor.exp_avg + i),
                             exp_avg_sq = fetch<Width>(tensor.exp_avg_sq + i), master = fetch<Width>(tensor.master + i);
  float g[Width], m[Width], v[Width], w[Width];
  unpack(grad, g);
  unpack(exp_avg, m);
  unpack(exp_avg_sq, v);
  unpack(master, w);
#pragma unroll
  for (int j = 0; j < Width; ++j) {
    g[j] *= factors.grad;
    m[j] += c.rate1 * (g[j] - m[j]);
    v[j] = c.beta2 * v[j] + c.rate2 * g[j] * g[j];
    w[j] -= factors.decay * w[j] + factors.step_size * (m[j] / (sqrtf(v[j]) * factors.root + c.eps));
  }
  store(tensor.exp_avg + i, m);
  store(tensor.exp_avg_sq + i, v);
  store(tensor.master + i, w);
  if constexpr (sizeof(W) == 2) store(static_cast<W*>(tensor.weight) + i, w);
}

// A CTA takes one tile.
template <class W, class G>
__global__ void __launch_bounds__(kThreads)
    update_tile(const __grid_constant__ Part part, const AdamwFactors* all_factors, Constants c) {
  constexpr int kVectorWidth = kWidth<W, G>;
  const int64_t tile = part.tensors[0].first_tile + blockIdx.x;
  const int index = tensor_of(part, tile);
  const AdamwTensor& tensor = part.tensors[index];
  const AdamwFactors factors = all_factors[part.first + index];
  if (factors.grad != factors.grad) return;
  const int64_t begin = (tile - tensor.first_tile) * kAdamwTile, last = begin + kAdamwTile,
                end = last < tensor.size ? last : tensor.size;
  int64_t rest = begin;
  if (at_16_bytes(tensor.weight, tensor.master, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq)) {
    rest += (end - begin) / kVectorWidth * kVectorWidth;
    for (int64_t i = begin + threadIdx.x * kVectorWidth; i < rest; i += kThreads * kVectorWidth)
      update<W, G, kVectorWidth>(tensor, factors, c, i);
  }
#pragma unroll 1  // mostly nothing
  for (int64_t i = rest + threadIdx.x; i < end; i += kThreads) update<W, G, 1>(tensor, factors, c, i);
}

template <class W, class G>
Status run(const AdamwParams& p, const Device& device) {
  const Constants c{static_cast<float>(1 - p.beta1), static_cast<float>(p.beta2), static_cast<float>(1 - p.beta2),
                    static_cast<float>(p.eps)};
  return for_parts(p.tensors, p.count, p.tiles, [&](const Part& part, int64_t tiles) {
    if (Status error = launch(prepare, {1}, Part::kMost, 0, device, part, p)) return error;
    return launch(update_tile<W, G>, {tiles}, kThreads, 0, device, part, p.factors, c);
  });
}

}  // namespace

Status adamw(const AdamwParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.weight_dtype, W,
                         return p.grad_dtype == DType::f32 ? run<W, float>(p, device) : run<W, W>(p, device))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
