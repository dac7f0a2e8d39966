// Penalties on tokens that a row has seen. A CTA takes a part of a row's vocabulary, counts in shared memory the tokens
// that fall into it, and changes the logits of those alone. The row's tokens are read once for each part, from the L2
// cache after the first; no count ever goes to memory.
#include "launch.cuh"
#include "llmcore/sample.h"
#include "llmcore/sampling_math.h"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// Tokens of a part: 32 KiB of counts, so that several CTAs share a multiprocessor.
constexpr int kPart = 8192;
constexpr uint32_t kInPrompt = 0x80000000u;  // beside the count of the output

template <class T>
__global__ void __launch_bounds__(kThreads) penalise(ApplyPenaltiesParams p) {
  PTX_SHARED_MEMORY(shared);
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared);
  const int64_t row = blockIdx.x, first = int64_t{blockIdx.y} * kPart;
  const int tokens_here = static_cast<int>(p.vocab - first < kPart ? p.vocab - first : kPart);
  const int thread = static_cast<int>(threadIdx.x);

  for (int i = thread; i < tokens_here; i += kThreads) counts[i] = 0;
  ptx::syncthreads();
  const int64_t* tokens = p.tokens + row * p.max_len;
  const int64_t prompt_len = p.prompt_lens[row];
  for (int64_t i = thread; i < p.max_len; i += kThreads) {
    const int64_t token = tokens[i] - first;
    if (token < 0 || token >= tokens_here) continue;
    if (i < prompt_len)
      ptx::shared_or(&counts[token], kInPrompt);
    else
      ptx::shared_add(&counts[token], 1);
  }
  ptx::syncthreads();
  T* logits = static_cast<T*>(p.logits) + row * p.logits_stride + first;
  const float repetition = p.repetition[row], presence = p.presence[row], frequency = p.frequency[row];
  for (int i = thread; i < tokens_here; i += kThreads)
    if (const uint32_t count = counts[i])
      logits[i] =
          from_float<T>(sampling::penalised(to_float(logits[i]), count & ~kInPrompt, repetition, presence, frequency));
}

template <class T>
Status start(const ApplyPenaltiesParams& p, const Device& device) {
  const Grid grid{p.rows, (p.vocab + kPart - 1) / kPart};
  return launch(penalise<T>, grid, kThreads, kPart * sizeof(uint32_t), device, p);
}

}  // namespace

Status apply_penalties(const ApplyPenaltiesParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (start<T>(p, device)))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
