#include "llmcore/global_norm.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// Elements whose squares are added in float32, in vectors; their sum goes on in float64.
constexpr int64_t kStretch = 1024;

template <class T>
double sum_of_squares(const T* x, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    float sum[1];
    const T* part = x + begin;
    sum_row(size - begin < kStretch ? size - begin : kStretch, sum, [&](int64_t i, auto n, vf(&sums)[1]) {
      const vf v = load_n(part + i, n);
      sums[0] = fma(v, v, sums[0]);
    });
    total += static_cast<double>(sum[0]);
  }
  return total;
}

template <class T>
void partial_sums(const GlobalNormParams& p, const Parallel& par) {
  parallel_ranges(par, p.tiles, 1, [&](int64_t begin, int64_t end) {
    const NormTensor* tensor = p.tensors;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tensor + 1 < p.tensors + p.count && tensor[1].first_tile <= tile) ++tensor;
      const int64_t first = (tile - tensor->first_tile) * kNormTile, left = tensor->size - first;
      p.partials[tile] =
          sum_of_squares(static_cast<const T*>(tensor->data) + first, left < kNormTile ? left : kNormTile);
    }
  });
}

}  // namespace

void global_norm(const GlobalNormParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, partial_sums<T>(p, par))
  double sum = 0;  // in the order of the tiles, whoever summed them
  for (int64_t tile = 0; tile < p.tiles; ++tile) sum += p.partials[tile];
  *p.norm = static_cast<float>(__builtin_sqrt(sum));
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
