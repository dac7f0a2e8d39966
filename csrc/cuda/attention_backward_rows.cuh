// What attention's backward kernels keep in the workspace for each query, and the small kernels around the large ones:
// they write it, and make dsinks and dQ of it.
#pragma once
#include "attention_backward.cuh"
#include "attention_backward_tiles.cuh"

namespace llmcore {
namespace cuda {

// ---- the rows' statistics ------------------------------------------------------------------------------------------

// At the workspace's start, for each head and each query: lse * log2(e), +inf where no key is seen (then every
// probability is 2^-inf = 0), and delta. A sequence's rows begin at an even one, so that two at a time can be copied as
// 16 bytes. Past the last row there is room for a tile of the sliced kernel to read.
struct alignas(8) Statistics {
  float lse, delta;
};
PTX_DEVICE Slots statistics_slots(const AttentionShape& s) { return {s.cu_q, s.seq_q, 2}; }
__host__ __device__ inline int64_t statistics_rows(const AttentionShape& s) {
  return s.batch ? (s.total_q / 2 + s.batch) * 2 : 0;
}
PTX_DEVICE Statistics* statistics(const AttentionBackwardParams& p, int64_t b, int64_t head) {
  return static_cast<Statistics*>(p.workspace) + head * statistics_rows(p.shape) +
         statistics_slots(p.shape).first(b) * 2;
}

// ---- the sums of dQ ------------------------------------------------------------------------------------------------

// Behind the statistics, when CTAs that own keys add to dQ: float32, as the accumulators' fragments. 16 rows and 8
// columns are 128 sums in the order of ptx::red_add_warp(); for each head, a sequence's blocks of 16 rows, and of each
// its columns' tiles.
constexpr int kSumRows = 16, kSumColumns = 8, kSums = kSumRows * kSumColumns;

PTX_DEVICE Slots sum_slots(const AttentionShape& s) { return {s.cu_q, s.seq_q, kSumRows}; }
__host__ __device__ inline int sum_tiles(const AttentionShape& s) {
  return static_cast<int>(ceil_div<int64_t>(s.head_dim, kSumColumns));
}
__host__ __device__ inline int64_t sums_of_head(const AttentionShape& s) {
  return count_slots(s.total_q, s.batch, kSumRows) * sum_tiles(s) * kSums;
}
__host__ __device__ inline int64_t statistics_bytes(const AttentionShape& s) {  // whole lines
  const int64_t rows = s.heads * statistics_rows(s) + kSlicedStreamed;
  return (rows * static_cast<int64_t>(sizeof(Statistics)) + 127) / 128 * 128;
}
// Those of a head, whose block of rows has the number `slot`.
PTX_DEVICE float* sums_of_rows(const AttentionBackwardParams& p, int64_t head, int64_t slot) {
  float* sums = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + statistics_bytes(p.shape));
  return sums + head * sums_of_head(p.shape) + slot * sum_tiles(p.shape) * kSums;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

constexpr int kPrepareThreads = 256, kLanesPerRow = 8, kPrepareRows = kPrepareThreads / kLanesPerRow;

// The statistics; and, when there are `sums` of dQ for each head, zeros there.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare(AttentionBackwardParams p, int64_t sums) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareRows + threadIdx.x / kLanesPerRow, head = blockIdx.y;
  const int b = static_cast<int>(statistics_slots(p.shape).sequence_of(row / 2, p.shape.batch));
  const int64_t share = ceil_div<int64_t>(sums / 4, gridDim.x), first = blockIdx.x * share;  // in 16 bytes
  for (int64_t i = first + threadIdx.x; i < first + share && i < sums / 4; i += kPrepareThreads)
    ptx::store_global_16(sums_of_rows(p, head, 0) + 4 * i, {});

  const Sequence seq = sequence(p.shape, b);
  const int64_t query = row - statistics_slots(p.shape).first(b) * 2;
  const bool exists = query < seq.num_q;  // the others stay for the shuffle
  const int part = static_cast<int>(threadIdx.x % kLanesPerRow), dim = static_cast<int>(p.shape.v_head_dim);
  float sum = 0.f;
  if (exists) {
    const auto row_of = [&](const void* base, const RowStrides& s) {
      return rows_of<const T>(base, s, b, seq.q_start + query, head, 1, dim).at;
    };
    const T *out = row_of(p.out, p.out_strides), *dout = row_of(p.dout, p.dout_strides);
    constexpr int W = kVector<T>;
    const bool aligned = (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(dout)) % 16 == 0;
    const int vectors = aligned ? dim / W * W : 0;
    for (int d = part * W; d < vectors; d += kLanesPerRow * W) {
      float x[W], y[W];
      load(out + d, x);
      load(dout + d, y);
#pragma unroll
      for (int i = 0; i < W; ++i) sum += x[i] * y[i];
    }
    for (int d = vectors + part; d < dim; d += kLanesPerRow) sum += to_float(out[d]) * to_float(dout[d]);
  }
#pragma unroll
  for (int i = 1; i < kLanesPerRow; i *= 2) sum += ptx::shfl_xor(sum, i);
  if (!exists || part != 0) return;
  const int64_t at = b * p.lse_batch + head * p.lse_head + seq.q_start + query;
  const float lse = p.lse[at];
  // The gradient of lse enters as a constant of the row. A row without keys has no gradient, whatever reaches its lse
  // (NaN, when -inf goes on through a logarithm).
  statistics(p, b, head)[query] =
      lse == -INFINITY ? Statistics{INFINITY, 0.f} : Statistics{lse * kLog2e, sum - (p.dlse ? p.dlse[at] : 0.f)};
}

constexpr int kSinkThreads = 256;

// dsinks[b, head]: minus the sum over the rows of their sink's probability times delta. One CTA for each.
__global__ void __launch_bounds__(kSinkThreads) sink_gradients(AttentionBackwardParams p) {
  PTX_SHARED_MEMORY(shared);
  float* partial = reinterpret_cast<float*>(shared);  // of each warp
  const int b = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int num_q = sequence(p.shape, b).num_q, thread = static_cast<int>(threadIdx.x);
  const Statistics* rows = statistics(p, b, head);
  const float sink = p.mask.sinks[head] * kLog2e;
  float sum = 0.f;
  for (int i = thread; i < num_q; i += kSinkThreads) sum -= ptx::exp2(sink - rows[i].lse) * rows[i].delta;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) sum += ptx::shfl_xor(sum, i);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  ptx::syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kSinkThreads / 32; ++i) sum += partial[i];
  p.dsinks[b * p.shape.heads + head] = sum;
}

// dQ out of its sums. A thread takes the 8 columns of rows `quad` and `quad + 8` of a fragment.
constexpr int kFinishThreads = 256, kFinishSlots = 4;

template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_dq(AttentionBackwardParams p) {
  const AttentionShape& s = p.shape;
  const Slots slots = sum_slots(s);
  const int64_t head = blockIdx.y, end = count_slots(s.total_q, s.batch, kSumRows);
  const int columns = sum_tiles(s), items = kFinishSlots * 8 * columns;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kFinishThreads) {
    const int tile = i % columns, quad = i / columns % 8;
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * kFinishSlots + i / columns / 8;
    if (slot >= end) return;
    const int b = static_cast<int>(slots.sequence_of(slot, s.batch));
    const Sequence seq = sequence(s, b);
    const int64_t row0 = (slot - slots.first(b)) * kSumRows + quad;
    if (row0 >= seq.num_q) continue;
    float x[4][4];
    ptx::read_sums(sums_of_rows(p, head, slot) + tile * kSums, quad, x);
    const Rows<T> to = rows_of<T>(p.dq, p.dq_strides, b, seq.q_start, head, seq.num_q, s.head_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + 8 * half;
      if (row >= to.count) continue;
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = x[e / 2][2 * half + e % 2] * p.mask.scale;
      T* at = to.at + row * to.stride + tile * kSumColumns;
      if (reinterpret_cast<uintptr_t>(at) % 16 == 0 && (tile + 1) * kSumColumns <= to.dim) {
        store(at, y);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (tile * kSumColumns + e < to.dim) at[e] = from_float<T>(y[e]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace llmcore
