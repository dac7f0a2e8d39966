// The twin of the CUDA kernel, row by row. On the CPU linear_cross_entropy.cpp has a shorter way; this one lets tests
// run what llmcore/ops/linear_cross_entropy_cuda.py makes of the CUDA kernel.
#include "llmcore/cross_entropy.h"

#include "cross_entropy_row.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kPart = 256;  // logits summed in one chain of float32

void find_loss(const CrossEntropyChunkParams& p, int64_t row, const float* logits) {
  float top = -__builtin_inff();
  double sum = 0, total = 0;
  for (int64_t begin = 0; begin < p.vocab; begin += kPart) {
    float part[3];
    summarise(logits + begin, p.vocab - begin < kPart ? p.vocab - begin : kPart, part, 1);
    const float larger = part[0] > top ? part[0] : top;
    sum = sum * __builtin_exp(top - larger) + part[1] * __builtin_exp(part[0] - larger);
    total += part[2];
    top = larger;
  }
  const float lse = top + static_cast<float>(__builtin_log(sum)), target = logits[p.targets[row]];
  const float mean = static_cast<float>(total / static_cast<double>(p.vocab));
  p.lse[row] = lse;
  p.loss[row] = lse - target + p.label_smoothing * (target - mean) + p.z_loss * lse * lse;
}

template <class G>
void run_row(const CrossEntropyChunkParams& p, int64_t row) {
  float* logits = p.logits + row * p.stride;
  const int64_t target = p.targets[row];
  if (target == p.ignore_index || target < 0 || target >= p.vocab) {
    if (p.loss) {
      p.loss[row] = target == p.ignore_index ? 0.f : __builtin_nanf("");
      p.lse[row] = 0.f;
    }
    if (p.dloss) __builtin_memset(logits, 0, p.vocab * sizeof(G));
    return;
  }
  if (p.softcap > 0.f) cap(logits, p.vocab, p.softcap);
  if (p.loss) find_loss(p, row, logits);
  if (p.dloss)
    differentiate(logits, reinterpret_cast<G*>(logits), p.vocab, target,
                  RowGradient(p, p.dloss[row * p.dloss_stride], p.lse[row]));
}

}  // namespace

void cross_entropy_chunk(const CrossEntropyChunkParams& p, const Parallel& par) {
  parallel_ranges(par, p.rows, row_grain(p.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      LLMCORE_DISPATCH_FLOAT(p.gradient, G, run_row<G>(p, row))
    }
  });
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
