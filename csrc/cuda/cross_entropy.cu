// Cross-entropy of rows of float32 logits, and their gradient in their place. Bound by memory: 4 bytes of a logit are
// read for the loss, and 4 read and 2 (4 in float32) written for the gradient.
//
// A team of threads shares a row: a warp, or a CTA when the row is long. It goes over the row once with an online
// softmax (Milakov & Gimelshein, arXiv 1805.02867), joins its threads' maxima and sums, and for the gradient goes over
// it again.
#include "llmcore/cross_entropy.h"

#include "device_errors.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kWarpThreads = 256;   // of a CTA whose warps each take a row
constexpr int kLongThreads = 512;   // of a CTA that takes one row
constexpr int64_t kLongRow = 2048;  // longer rows are a CTA's
constexpr int kWidth = 8;           // logits that a thread takes at once: 16 bytes of a 16-bit gradient
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

using Logits = Packed<float, kWidth>;

template <int Size>
PTX_DEVICE void team_sync() {
  if constexpr (Size == 32)
    ptx::syncwarp();
  else
    ptx::syncthreads();
}

// e^(x - y)
PTX_DEVICE float exp_of(float x, float y) { return ptx::exp2((x - y) * kLog2e); }

// f(column, logits) for each of the team's chunks in turn; all threads of the team make as many calls, those whose
// chunk lies outside the row with undefined logits. The next chunk is fetched before the call.
template <int Size, class F>
PTX_DEVICE void for_chunks(const float* row, int64_t vocab, const F& f) {
  int64_t column = threadIdx.x % Size * kWidth;
  Logits next = {};
  if (column < vocab) next = fetch<kWidth>(row + column);
#pragma unroll 1
  for (int64_t start = 0; start < vocab; start += Size * kWidth) {
    const Logits now = next;
    const int64_t here = column;
    column += Size * kWidth;
    if (column < vocab) next = fetch<kWidth>(row + column);
    f(here, now);
  }
}

template <bool Capped>
struct Cap {
  float softcap, inverse;
  __device__ explicit Cap(float c) : softcap(c), inverse(Capped ? 1.f / c : 0.f) {}
  // The logit as the loss sees it; `slope` becomes its derivative.
  __device__ float operator()(float x, float& slope) const {
    if constexpr (!Capped) return x;
    const float t = tanhf(x * inverse);
    slope = 1.f - t * t;
    return softcap * t;
  }
  __device__ float operator()(float x) const {
    float slope;
    return (*this)(x, slope);
  }
};

// What a thread, then its team, knows of a row: the largest logit, the sum of e^(logit - largest), the sum of all.
struct Summary {
  float top = -kInfinity, sum = 0.f, total = 0.f;
};

template <int Size, bool Capped>
PTX_DEVICE Summary summarise(const float* row, int64_t vocab, const Cap<Capped>& cap) {
  Summary s;
  for_chunks<Size>(row, vocab, [&](int64_t column, const Logits& logits) {
    if (column >= vocab) return;
    float x[kWidth];
    unpack(logits, x);
    float top = s.top, total = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool inside = column + i < vocab;
      x[i] = inside ? cap(x[i]) : -kInfinity;
      top = fmaxf(top, x[i]);
      total += inside ? x[i] : 0.f;
    }
    const float base = top == -kInfinity ? 0.f : top;  // -inf - -inf would be NaN
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += exp_of(x[i], base);
    s = {top, s.sum * exp_of(s.top, base) + sum, s.total + total};
  });
  return s;
}

// What multiplies the parts of a row's gradient.
struct Factors {
  float lse, of_lse, of_mean, of_target;
  __device__ Factors(const CrossEntropyChunkParams& p, int64_t row, float row_lse) : lse(row_lse) {
    const float dloss = p.dloss[row * p.dloss_stride];
    of_lse = dloss * (1.f + 2.f * p.z_loss * lse);
    of_mean = dloss * p.label_smoothing / static_cast<float>(p.vocab);
    of_target = dloss * (1.f - p.label_smoothing);
  }
};

// A gradient of 16 bits takes the first half of the row. Its chunks land where logits of the same or of earlier steps
// were: each thread holds its logits of this step and the next in registers when the team meets, and only then writes.
template <class G, int Size, bool Capped>
PTX_DEVICE void differentiate(float* row, int64_t vocab, int64_t target, const Cap<Capped>& cap, const Factors& f) {
  G* out = reinterpret_cast<G*>(row);
  if constexpr (sizeof(G) == 4) team_sync<Size>();  // the target's logit has been read
  for_chunks<Size>(row, vocab, [&](int64_t column, const Logits& logits) {
    if constexpr (sizeof(G) < 4) team_sync<Size>();
    if (column >= vocab) return;
    float x[kWidth];
    unpack(logits, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float slope = 1.f;
      const float direct = f.of_mean + (column + i == target ? f.of_target : 0.f);
      x[i] = exp_of(cap(x[i], slope), f.lse) * f.of_lse - direct;
      x[i] *= slope;
    }
    store(out + column, x);
  });
}

template <class G, int Size>
PTX_DEVICE void fill_zeros(float* row, int64_t vocab) {
  for (int64_t column = threadIdx.x % Size * kWidth; column < vocab; column += Size * kWidth)
    put(reinterpret_cast<G*>(row) + column, Packed<G, kWidth>{});
}

template <int Threads, int Size>
constexpr int kSharedBytes = TeamMax<Threads, Size, 1>::kBytes + TeamSum<Threads, Size, 2>::kBytes;

// G: of the gradient. `records` may be null: errors are then not recorded.
template <class G, int Threads, int Size, bool Capped>
__global__ void __launch_bounds__(Threads, 1024 / Threads) chunk(CrossEntropyChunkParams p, ErrorRecord* records) {
  PTX_SHARED_MEMORY(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (Threads / Size) + threadIdx.x / Size;
  if (row >= p.rows) return;  // whole teams, which meet with no other
  const bool leader = threadIdx.x % Size == 0;
  float* logits = p.logits + row * p.stride;
  const int64_t target = p.targets[row];
  const bool inside = target >= 0 && target < p.vocab;
  if (target == p.ignore_index || !inside) {
    if (p.loss && leader) {
      const bool ignored = target == p.ignore_index;
      p.loss[row] = ignored ? 0.f : ptx::from_bits(0x7fc00000);
      p.lse[row] = 0.f;
      if (!ignored && records)
        report_error(records, DeviceError::target_outside_vocabulary, p.first + row, target, 0, p.vocab - 1,
                     p.ignore_index);
    }
    if (p.dloss) fill_zeros<G, Size>(logits, p.vocab);
    return;
  }

  const Cap<Capped> cap(p.softcap);
  float lse;
  if (p.loss) {
    const float at_target = leader ? cap(logits[target]) : 0.f;
    const Summary mine = summarise<Size>(logits, p.vocab, cap);
    float top[1] = {mine.top};
    TeamMax<Threads, Size, 1>{shared}(top);
    const float base = top[0] == -kInfinity ? 0.f : top[0];
    float sums[2] = {mine.sum * exp_of(mine.top, base), mine.total};
    TeamSum<Threads, Size, 2>{shared + TeamMax<Threads, Size, 1>::kBytes}(sums);
    lse = base + logf(sums[0]);
    if (leader) {
      const float mean = sums[1] / static_cast<float>(p.vocab);
      p.loss[row] = lse - at_target + p.label_smoothing * (at_target - mean) + p.z_loss * lse * lse;
      p.lse[row] = lse;
    }
  } else {
    lse = p.lse[row];
  }
  if (p.dloss) differentiate<G, Size>(logits, p.vocab, target, cap, Factors(p, row, lse));
}

template <class G, int Threads, int Size>
Status start(const CrossEntropyChunkParams& p, const Device& device) {
  ErrorRecord* records = nullptr;
  if (Status error = error_records(device, records)) return error;
  constexpr int64_t kTeams = Threads / Size;
  const auto kernel = p.softcap > 0.f ? chunk<G, Threads, Size, true> : chunk<G, Threads, Size, false>;
  return launch(kernel, {(p.rows + kTeams - 1) / kTeams}, Threads, kSharedBytes<Threads, Size>, device, p, records);
}

template <class G>
Status with_team(const CrossEntropyChunkParams& p, const Device& device) {
  return p.vocab <= kLongRow ? start<G, kWarpThreads, 32>(p, device) : start<G, kLongThreads, kLongThreads>(p, device);
}

}  // namespace

Status cross_entropy_chunk(const CrossEntropyChunkParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.gradient, G, return (with_team<G>(p, device)))
  return "unknown dtype of the gradient";
}

}  // namespace cuda
}  // namespace llmcore
