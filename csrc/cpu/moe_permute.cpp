#include "llmcore/moe_permute.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves

LLMCORE_INLINE int64_t token_grain(int64_t top_k, int64_t dim) { return kGrainElements / (top_k * dim + 1) + 1; }

template <class T>
void scatter(const MoeScatterParams& p, const Parallel& par) {
  const int64_t k = p.top_k, main = p.dim / kLanes * kLanes, tail = p.dim - main;
  parallel_ranges(par, p.tokens, token_grain(k, p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
      for (int64_t a = t * k; a < (t + 1) * k; ++a) {
        T* sorted = static_cast<T*>(p.sorted) + p.row_of[a] * p.dim;
        if (p.weights) {
          const float w = p.weights[a];
          for (int64_t i = 0; i < main; i += kLanes) store(sorted + i, load(x + i) * w);
          if (tail) store_n(sorted + main, load_n(x + main, tail) * w, tail);
        } else {
          __builtin_memcpy(sorted, x, p.dim * sizeof(T));
        }
        if (p.y) {
          const T* y = static_cast<const T*>(p.y) + p.row_of[a] * p.y_stride;
          vf dot0 = zero(), dot1 = zero();
          int64_t i = 0;
          for (; i + 2 * kLanes <= main; i += 2 * kLanes) {
            dot0 = fma(load(y + i), load(x + i), dot0);
            dot1 = fma(load(y + i + kLanes), load(x + i + kLanes), dot1);
          }
          if (i < main) dot0 = fma(load(y + i), load(x + i), dot0);
          if (tail) dot1 = fma(load_n(y + main, tail), load_n(x + main, tail), dot1);
          p.dweights[a] = reduce_sum(dot0 + dot1);
        }
      }
    }
  });
}

template <class T>
void gather(const MoeGatherParams& p, const Parallel& par) {
  const int64_t k = p.top_k;
  constexpr int64_t kUnroll = 4;
  parallel_ranges(par, p.tokens, token_grain(k, p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* rows = p.row_of + t * k;
      const float* weights = p.weights ? p.weights + t * k : nullptr;
      T* out = static_cast<T*>(p.out) + t * p.dim;
      int64_t i = 0;
      for (; i + kUnroll * kLanes <= p.dim; i += kUnroll * kLanes) {
        vf sum[kUnroll] = {};
        for (int64_t j = 0; j < k; ++j) {
          const T* row = static_cast<const T*>(p.sorted) + rows[j] * p.sorted_stride + i;
          const vf w = set1(weights ? weights[j] : 1.f);
          for (int u = 0; u < kUnroll; ++u) sum[u] = fma(load(row + u * kLanes), w, sum[u]);
        }
        for (int u = 0; u < kUnroll; ++u) store(out + i + u * kLanes, sum[u]);
      }
      for (; i < p.dim; i += kLanes) {
        vf sum = zero();
        for (int64_t j = 0; j < k; ++j) {
          const T* row = static_cast<const T*>(p.sorted) + rows[j] * p.sorted_stride + i;
          sum = fma(load_n(row, p.dim - i), set1(weights ? weights[j] : 1.f), sum);
        }
        store_n(out + i, sum, p.dim - i);
      }
    }
  });
}

}  // namespace

// One thread: 4 bytes per assignment against the whole rows that are moved after it.
void moe_sort(const MoeSortParams& p, const Parallel&) {
  int32_t* offsets = p.offsets;
  const int64_t assignments = p.tokens * p.top_k;
  for (int64_t e = 0; e <= p.num_experts; ++e) offsets[e] = 0;
  for (int64_t a = 0; a < assignments; ++a) ++offsets[p.experts[a] + 1];
  for (int64_t e = 0; e < p.num_experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t a = 0; a < assignments; ++a) p.row_of[a] = offsets[p.experts[a]]++;
  for (int64_t e = p.num_experts; e > 0; --e) offsets[e] = offsets[e - 1];  // each start had moved to its end
  offsets[0] = 0;
  if (!p.token_of) return;
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t j = 0; j < p.top_k; ++j) p.token_of[p.row_of[t * p.top_k + j]] = static_cast<int32_t>(t);
}

void moe_scatter(const MoeScatterParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, scatter<T>(p, par))
}

void moe_gather(const MoeGatherParams& p, const Parallel& par) { LLMCORE_DISPATCH_FLOAT(p.dtype, T, gather<T>(p, par)) }

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
