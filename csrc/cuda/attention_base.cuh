// What all attention kernels share, forward and backward: lengths, and who sees whom by position.
#pragma once
#include "llmcore/attention.h"
#include "tile.cuh"

namespace llmcore {
namespace cuda {

constexpr float kNegInf = -__builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- sequences -----------------------------------------------------------------------------------------------------

// Rows and keys within a sequence are 32-bit (the launcher refuses more), offsets into tensors 64-bit.
struct Sequence {
  int num_q, num_k;
  int q_start, k_start;  // first rows in packed tensors, else 0
};

PTX_DEVICE Sequence sequence(const AttentionShape& s, int b) {
  Sequence x{static_cast<int>(s.seq_q), static_cast<int>(s.seq_k), 0, 0};
  if (s.cu_q) x.q_start = s.cu_q[b], x.num_q = s.cu_q[b + 1] - s.cu_q[b];
  if (s.cu_k) x.k_start = s.cu_k[b], x.num_k = s.cu_k[b + 1] - s.cu_k[b];
  if (s.block_table) x.num_k = s.kv_lens[b];
  return x;
}

// ---- masks by position ---------------------------------------------------------------------------------------------

struct Range {
  int first, last;  // empty when last < first
};
using KeyRange = Range;

// A query at position x sees the keys [x - below, x + above] of its sequence. 32 bits are enough, for positions are
// smaller than kNoEnd.
constexpr int kNoEnd = 1 << 30;
struct Band {
  int below, above;
};
PTX_DEVICE Band band_of(const AttentionMask& m) {
  const int reach = m.window ? static_cast<int>(smaller<int64_t>(m.window - 1, kNoEnd)) : kNoEnd;
  return {reach, m.causal ? 0 : reach};
}
PTX_DEVICE int position_of(const Sequence& seq, int query) { return query + seq.num_k - seq.num_q; }

// The keys that a query sees by position. Both ends move right with the query.
PTX_DEVICE KeyRange visible_keys(const Band& band, int num_k, int position) {
  return {larger(position - band.below, 0), smaller(position + band.above, num_k - 1)};
}

}  // namespace cuda
}  // namespace llmcore
