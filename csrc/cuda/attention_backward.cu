// The backward pass of attention by tiles (FlashAttention-2, arXiv 2307.08691), on mma.sync. With P the probabilities,
// rebuilt from q, k and the forward pass's lse:
//   dP = dO V^T,  delta = rowsum(dO * O) - dlse,  dS = P * (dP - delta),
//   dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.
//
// Three steps (docs/cuda-attention-backward.md):
//   prepare    delta and lse of each row, into the workspace; dsinks out of them
//   gradients  with CTAs that own keys: dK, dV
//   gradients  with CTAs that own queries: dQ
// The last two are one kernel. A CTA keeps its rows' tile in shared memory and walks over the rows of the other side
// that it meets ("the stream"). It sums its own gradients in registers, always in the same order: no atomics, and the
// same bits in every run. That costs S and dP a second time, 7 matrix products for 5.
#include <iterator>

#include "attention_backward.cuh"

namespace llmcore {
namespace cuda {
namespace {

// ---- the tiles -----------------------------------------------------------------------------------------------------

// Warps stand in `groups`. The `split` warps of a group share blocks * 16 rows of the owned tile: each takes its share
// of the streamed rows' scores (`step` of them) and its share of the gradients' columns.
struct Tile {
  int dim, v_dim;  // the head sizes it serves, up to these
  int blocks, split, groups, step;

  __host__ __device__ constexpr int threads() const { return groups * split * 32; }
  __host__ __device__ constexpr int owned() const { return groups * blocks * 16; }
  __host__ __device__ constexpr int streamed() const { return split * step; }
  __host__ __device__ constexpr int owned_bytes() const { return owned() * (dim + v_dim) * 2; }
  __host__ __device__ constexpr int stream_bytes() const { return streamed() * (dim + v_dim) * 2; }
  __host__ __device__ constexpr int exchange_bytes(bool keys) const {
    return split == 1 ? 0 : owned() * streamed() * (keys ? 4 : 2);
  }
  __host__ __device__ constexpr int shared_bytes(bool keys) const {
    return owned_bytes() + 2 * (stream_bytes() + (keys ? streamed() * 8 : 0)) + exchange_bytes(keys);
  }
};

// What decides: a thread has at most 255 registers, of which the gradients take blocks * (dim + v_dim) / (2 * split)
// (without v_dim where queries are owned) and the scores blocks * step. A fragment of the stream serves `blocks`
// products, so that with 1 the tensor cores wait for shared memory. Shared memory: 99 KB on sm_86 and sm_89, 163 on
// sm_80, 227 on sm_90; the first tile that holds the head sizes and fits the device is taken.
constexpr Tile kKeyTiles[] = {
    // dim v_dim blocks split groups step
    {64, 64, 2, 1, 4, 32},    // 49 KB: two CTAs on a multiprocessor
    {96, 96, 1, 1, 4, 64},    // 73 KB
    {128, 128, 2, 2, 4, 32},  // 161 KB: two warps share the columns, so that two blocks of rows fit in registers
    {128, 128, 1, 1, 8, 32},  // 97 KB
    {192, 128, 1, 2, 4, 32},  // 137 KB
    {192, 128, 1, 2, 4, 16},  // 89 KB
    {256, 256, 2, 4, 2, 16},  // 209 KB
    {256, 256, 1, 2, 4, 16},  // 137 KB
};
constexpr Tile kQueryTiles[] = {
    {64, 64, 2, 1, 4, 32},    // 48 KB
    {96, 96, 2, 1, 4, 32},    // 72 KB
    {128, 128, 2, 1, 4, 32},  // 96 KB
    {192, 128, 1, 1, 4, 32},  // 80 KB
    {256, 256, 1, 1, 4, 32},  // 128 KB
};
template <bool kKeys>
__host__ __device__ constexpr const auto& tiles() {
  if constexpr (kKeys)
    return kKeyTiles;
  else
    return kQueryTiles;
}

// Every other head size: the gradients' columns are dealt out to CTAs (the grid's z), and each sums S and dP over
// slices of the head dimension. 4 warps own 16 rows each.
constexpr int kSlice = 64, kSlicedOwned = 64, kSlicedStreamed = 32, kSlicedThreads = 128;
constexpr int kSliceBytes = (kSlicedOwned + kSlicedStreamed) * kSlice * 2;
__host__ __device__ constexpr int sliced_columns(bool keys) { return keys ? 128 : 256; }  // of dK and of dV; of dQ

// ---- the rows' statistics ------------------------------------------------------------------------------------------

// In the workspace, for each head and each query: lse * log2(e), +inf where no key is seen (then every probability is
// 2^-inf = 0), and delta. A sequence's rows begin at an even one, so that two at a time can be copied as 16 bytes. Past
// the last row there is room for a tile of the sliced kernel to read.
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

constexpr int kPrepareThreads = 256, kLanesPerRow = 8, kPrepareRows = kPrepareThreads / kLanesPerRow;

template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare(AttentionBackwardParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareRows + threadIdx.x / kLanesPerRow, head = blockIdx.y;
  const int64_t b = statistics_slots(p.shape).sequence_of(row / 2, p.shape.batch);
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
  const int64_t b = blockIdx.x, head = blockIdx.y;
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

// ---- what a CTA owns, and whom it meets ----------------------------------------------------------------------------

struct Step {  // a tile of the stream
  int64_t head;
  int row;
  View view;
};

// Keys meet the queries of all heads of their group that see them, queries the keys that they see.
template <bool kKeys, int kOwned, int kStreamed>
struct Walk {
  Sequence seq;
  Visibility visible;
  int64_t kv_head, head, head_end;  // query heads [head, head_end)
  int owned_row;                    // the first owned row
  Range range;                      // of the stream, begun at a multiple of kStreamed

  __device__ bool begin(const AttentionBackwardParams& p) {
    const AttentionShape& s = p.shape;
    // Under a causal mask the first keys and the last queries have the most work: they go first.
    const int64_t slot = kKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x, group = s.heads / s.kv_heads;
    const Slots slots{kKeys ? s.cu_k : s.cu_q, kKeys ? s.seq_k : s.seq_q, kOwned};
    seq = sequence(s, slots.sequence_of(slot, s.batch));
    const int64_t row = (slot - slots.first(seq.b)) * kOwned;
    if (row >= (kKeys ? seq.num_k : seq.num_q)) return false;
    owned_row = static_cast<int>(row);
    head = kKeys ? blockIdx.y * group : blockIdx.y;
    head_end = head + (kKeys ? group : 1);
    kv_head = head / group;
    visible = visibility(p.mask, seq);
    const int last = smaller(owned_row + kOwned, kKeys ? seq.num_k : seq.num_q) - 1;
    range = kKeys ? visible.queries_of(owned_row, last) : visible.keys_of(owned_row, last);
    return true;
  }
  __device__ Step first() const {
    if (range.last < range.first) return {head_end, 0, View::none};
    return next({head, range.first / kStreamed * kStreamed - kStreamed, View::none});
  }
  __device__ Step next(Step s) const {
    do {
      s.row += kStreamed;
      if (s.row > range.last) {
        s.row = range.first / kStreamed * kStreamed;
        if (++s.head == head_end) break;
      }
      s.view = kKeys ? visible.of_tile(s.head, s.row, kStreamed, owned_row, kOwned)
                     : visible.of_tile(s.head, owned_row, kOwned, s.row, kStreamed);
    } while (s.view == View::none);
    return s;
  }
  __device__ bool ended(const Step& s) const { return s.head == head_end; }
};

// The inputs as rows: q and dout, or k and v. `first` is the one of head size dim, the other has v_dim.
template <class T>
PTX_DEVICE Rows<const T> query_rows(const AttentionBackwardParams& p, const Sequence& s, int64_t head, bool first) {
  return rows_of<const T>(first ? p.q : p.dout, first ? p.q_strides : p.dout_strides, s.b, s.q_start, head, s.num_q,
                          first ? p.shape.head_dim : p.shape.v_head_dim);
}
template <class T>
PTX_DEVICE Rows<const T> key_rows(const AttentionBackwardParams& p, const Sequence& s, int64_t kv_head, bool first) {
  return rows_of<const T>(first ? p.k : p.v, first ? p.k_strides : p.v_strides, s.b, s.k_start, kv_head, s.num_k,
                          first ? p.shape.head_dim : p.shape.v_head_dim);
}
template <class T, bool kKeys, class W>
PTX_DEVICE Rows<const T> owned_rows(const AttentionBackwardParams& p, const W& w, bool first) {
  if constexpr (kKeys)
    return key_rows<T>(p, w.seq, w.kv_head, first);
  else
    return query_rows<T>(p, w.seq, w.head, first);
}
template <class T, bool kKeys, class W>
PTX_DEVICE Rows<const T> streamed_rows(const AttentionBackwardParams& p, const W& w, const Step& s, bool first) {
  if constexpr (kKeys)
    return query_rows<T>(p, w.seq, s.head, first);
  else
    return key_rows<T>(p, w.seq, w.kv_head, first);
}

// ---- scores to gradients -------------------------------------------------------------------------------------------

// In: raw scores in s, dP in ds, of a tile of rows from `row` (owned) and columns from `column` (streamed) on. Out: P
// and dS. A query's statistics are those of its row (two rows of each block in a thread) or of its column.
template <bool kKeys, int kBlocks, int kStep, class W>
PTX_DEVICE void score_gradients(const AttentionMask& mask, const W& walk, const Step& step, int row, int column,
                                const Statistics (&of_rows)[kBlocks][2], const Statistics* of_columns,
                                Accumulator<kBlocks, kStep>& s, Accumulator<kBlocks, kStep>& ds) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  // Scores become exponents of 2, s * factor. With a soft cap, t = tanh(score / cap), and dS goes through 1 - t^2.
  float factor = mask.scale * kLog2e, tanh_of = 0.f;
  if (mask.softcap > 0.f) {
    const float in = mask.scale / mask.softcap;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s.c[m][n][i] = tanhf(s.c[m][n][i] * in);
    factor = mask.softcap * kLog2e;
    tanh_of = 1.f;
  }
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
    struct alignas(16) {
      Statistics of[2];
    } columns;
    if constexpr (kKeys) columns = reinterpret_cast<const decltype(columns)*>(of_columns)[n * 4 + lane % 4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Statistics x = kKeys ? columns.of[i % 2] : of_rows[m][i / 2];
        const float score = s.c[m][n][i], t = score * tanh_of, prob = ptx::exp2(score * factor - x.lse);
        s.c[m][n][i] = prob;
        ds.c[m][n][i] = prob * (ds.c[m][n][i] - x.delta) * (1.f - t * t);
      }
  }
  if (step.view == View::all) return;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int owned = row + m * 16 + i / 2 * 8 + lane / 4, streamed = column + n * 8 + lane % 4 * 2 + i % 2;
        if (!walk.visible.sees(step.head, kKeys ? streamed : owned, kKeys ? owned : streamed))
          s.c[m][n][i] = ds.c[m][n][i] = 0.f;
      }
}

// The statistics of the owned rows that a thread's accumulators hold. Rows that don't exist get some that does no harm.
template <bool kKeys, int kBlocks, class W>
PTX_DEVICE void load_statistics(const AttentionBackwardParams& p, const W& w, int row, Statistics (&x)[kBlocks][2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + m * 16 + half * 8 + lane / 4;
      x[m][half] = {INFINITY, 0.f};
      if (!kKeys && at < w.seq.num_q) x[m][half] = statistics(p, w.seq.b, w.head)[at];
    }
}

// Writes dK and dV, or dQ.
template <class T, bool kKeys, int kBlocks, int kWidth, int kVWidth, class W>
PTX_DEVICE void write_gradients(const AttentionBackwardParams& p, const W& w, int row, int column, int v_column,
                                const Accumulator<kBlocks, kWidth>& first,
                                const Accumulator<kBlocks, kVWidth>& second) {
  const Sequence& s = w.seq;
  if constexpr (kKeys) {
    write(first, rows_of<T>(p.dk, p.dk_strides, s.b, s.k_start, w.kv_head, s.num_k, p.shape.head_dim), row, column,
          p.mask.scale);
    write(second, rows_of<T>(p.dv, p.dv_strides, s.b, s.k_start, w.kv_head, s.num_k, p.shape.v_head_dim), row, v_column,
          1.f);
  } else {
    write(first, rows_of<T>(p.dq, p.dq_strides, s.b, s.q_start, w.head, s.num_q, p.shape.head_dim), row, column,
          p.mask.scale);
  }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

template <class T, bool kKeys, int kEntry>
__global__ void __launch_bounds__(tiles<kKeys>()[kEntry].threads()) gradients(AttentionBackwardParams p) {
  constexpr Tile kTile = tiles<kKeys>()[kEntry];
  constexpr int kDim = kTile.dim, kVDim = kTile.v_dim, kBlocks = kTile.blocks, kSplit = kTile.split, kStep = kTile.step;
  constexpr int kOwned = kTile.owned(), kStreamed = kTile.streamed(), kThreads = kTile.threads();
  constexpr int kWidth = kDim / kSplit, kVWidth = kVDim / kSplit;
  PTX_SHARED_MEMORY(shared);
  uint8_t *owned = shared, *streams = owned + kTile.owned_bytes(), *columns = streams + 2 * kTile.stream_bytes();
  ptx::Vec16* exchange = reinterpret_cast<ptx::Vec16*>(columns + (kKeys ? 2 * kStreamed * 8 : 0));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = thread / 32 / kSplit, part = thread / 32 % kSplit;

  Walk<kKeys, kOwned, kStreamed> walk;
  if (!walk.begin(p)) return;
  const int row = walk.owned_row + group * kBlocks * 16;  // this warp's first

  const auto stage_stream = [&](const Step& step, int buffer) {
    uint8_t* to = streams + buffer * kTile.stream_bytes();
    stage<T, kStreamed, kDim, kThreads>(to, streamed_rows<T, kKeys>(p, walk, step, true), step.row, 0);
    stage<T, kStreamed, kVDim, kThreads>(to + SharedTile<kDim>::bytes(kStreamed),
                                         streamed_rows<T, kKeys>(p, walk, step, false), step.row, 0);
    if (kKeys && thread < kStreamed / 2) {
      const int left = smaller(larger(walk.seq.num_q - step.row - 2 * thread, 0), 2);
      const Statistics* from = statistics(p, walk.seq.b, step.head) + (left ? step.row + 2 * thread : 0);
      ptx::copy_async_16(ptx::shared_address(columns + buffer * kStreamed * 8 + thread * 16), from, left * 8);
    }
  };

  Accumulator<kBlocks, kWidth> first;                // dK or dQ
  Accumulator<kBlocks, kKeys ? kVWidth : 8> second;  // dV
  Statistics of_rows[kBlocks][2];
  clear(first);
  clear(second);
  load_statistics<kKeys>(p, walk, row, of_rows);

  Step step = walk.first();
  if (!walk.ended(step)) {
    stage<T, kOwned, kDim, kThreads>(owned, owned_rows<T, kKeys>(p, walk, true), walk.owned_row, 0);
    stage<T, kOwned, kVDim, kThreads>(owned + SharedTile<kDim>::bytes(kOwned), owned_rows<T, kKeys>(p, walk, false),
                                      walk.owned_row, 0);
    stage_stream(step, 0);
    ptx::copy_commit();
  }
  for (int buffer = 0; !walk.ended(step); buffer ^= 1) {
    const Step next = walk.next(step);
    ptx::copy_wait<0>();
    ptx::syncthreads();  // this tile is here, and no warp is still at the one whose buffer the next tile takes
    if (!walk.ended(next)) stage_stream(next, buffer ^ 1);
    ptx::copy_commit();

    const uint32_t own = ptx::shared_address(owned), own_v = own + SharedTile<kDim>::bytes(kOwned);
    const uint32_t stream = ptx::shared_address(streams + buffer * kTile.stream_bytes());
    const uint32_t stream_v = stream + SharedTile<kDim>::bytes(kStreamed);
    Accumulator<kBlocks, kStep> s, ds;
    clear(s);
    clear(ds);
    multiply_rows<T, kDim>(s, own, group * kBlocks * 16, stream, part * kStep);
    multiply_rows<T, kVDim>(ds, own_v, group * kBlocks * 16, stream_v, part * kStep);
    const Statistics* of_columns = reinterpret_cast<const Statistics*>(columns + buffer * kStreamed * 8) + part * kStep;
    score_gradients<kKeys>(p.mask, walk, step, row, step.row + part * kStep, of_rows, of_columns, s, ds);

    // P and dS go on as A fragments: straight from the registers, or by way of shared memory when a group's warps have
    // to see each other's. There a fragment is what a warp stored, in the order of its lanes.
    const auto exchanged = [&](int which, int m, int n) {
      return exchange + (((which * kTile.groups + group) * kBlocks + m) * (kStreamed / 16) + n) * 32 + lane;
    };
    if constexpr (kSplit > 1) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int n = 0; n < kStep / 16; ++n) {
          ptx::Vec16 fragment;
          as_fragment<T>(fragment.x, ds.c[m][2 * n], ds.c[m][2 * n + 1]);
          *exchanged(0, m, part * (kStep / 16) + n) = fragment;
          if constexpr (kKeys) {
            as_fragment<T>(fragment.x, s.c[m][2 * n], s.c[m][2 * n + 1]);
            *exchanged(1, m, part * (kStep / 16) + n) = fragment;
          }
        }
      ptx::barrier_sync(1 + group, kSplit * 32);
    }
    const auto fragments = [&](uint32_t(&a)[kBlocks][4], bool of_ds, int n) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        if constexpr (kSplit > 1) {
          const ptx::Vec16 fragment = *exchanged(of_ds ? 0 : 1, m, n);
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = fragment.x[i];
        } else {
          const auto& x = of_ds ? ds.c[m] : s.c[m];
          as_fragment<T>(a[m], x[2 * n], x[2 * n + 1]);
        }
    };
    uint32_t a[kBlocks][4];
    if constexpr (kKeys) {
#pragma unroll
      for (int n = 0; n < kStreamed / 16; ++n) {
        fragments(a, false, n);
        multiply_columns<T, kVDim, kVWidth>(second, 0, a, stream_v, n * 16, part * kVWidth / 8);
      }
    }
#pragma unroll
    for (int n = 0; n < kStreamed / 16; ++n) {
      fragments(a, true, n);
      multiply_columns<T, kDim, kWidth>(first, 0, a, stream, n * 16, part * kWidth / 8);
    }
    step = next;
  }
  write_gradients<T, kKeys>(p, walk, row, part * kWidth, part * kVWidth, first, second);
}

// The same in slices of the head dimension, for a share of the gradients' columns. Slices pass through a ring of two:
// for each tile of the stream those that S is summed over, those of dP, then the columns that P and dS meet.
template <class T, bool kKeys>
__global__ void __launch_bounds__(kSlicedThreads) sliced_gradients(AttentionBackwardParams p) {
  constexpr int kColumns = sliced_columns(kKeys), kColumnSlices = kColumns / kSlice;
  constexpr int kOwnedBytes = SharedTile<kSlice>::bytes(kSlicedOwned);
  PTX_SHARED_MEMORY(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, column0 = static_cast<int>(blockIdx.z) * kColumns;
  const auto slices_of = [](int64_t dim) { return static_cast<int>((dim + kSlice - 1) / kSlice); };
  const int slices = slices_of(p.shape.head_dim), v_slices = slices_of(p.shape.v_head_dim), summed = slices + v_slices;

  Walk<kKeys, kSlicedOwned, kSlicedStreamed> walk;
  if (!walk.begin(p)) return;
  const int row = walk.owned_row + warp * 16;

  // What is staged next: slice `ahead` of the tile `ahead_step`.
  Step ahead_step = walk.first();
  int ahead = 0, buffer = 0;
  const auto stage_ahead = [&] {
    if (!walk.ended(ahead_step)) {
      uint8_t* to = shared + buffer * kSliceBytes;
      const int column_slice = ahead - summed;  // dV's first, then those of dK or dQ
      const bool of_v = column_slice < 0 ? ahead >= slices : kKeys && column_slice < kColumnSlices;
      const int column =
          column_slice < 0 ? (ahead - (of_v ? slices : 0)) * kSlice : column0 + column_slice % kColumnSlices * kSlice;
      if (column_slice < 0)
        stage<T, kSlicedOwned, kSlice, kSlicedThreads>(to, owned_rows<T, kKeys>(p, walk, !of_v), walk.owned_row,
                                                       column);
      stage<T, kSlicedStreamed, kSlice, kSlicedThreads>(
          to + kOwnedBytes, streamed_rows<T, kKeys>(p, walk, ahead_step, !of_v), ahead_step.row, column);
      if (++ahead == summed + kColumnSlices * (kKeys ? 2 : 1)) {
        ahead = 0;
        ahead_step = walk.next(ahead_step);
      }
    }
    ptx::copy_commit();
  };
  const auto take = [&] {  // the slice that was staged last; the next one's copies start
    ptx::copy_wait<0>();
    ptx::syncthreads();
    const uint32_t here = ptx::shared_address(shared + buffer * kSliceBytes);
    buffer ^= 1;
    stage_ahead();
    return here;
  };

  Accumulator<1, kColumns> first;
  Accumulator<1, kKeys ? kColumns : 8> second;
  Statistics of_rows[1][2];
  clear(first);
  clear(second);
  load_statistics<kKeys>(p, walk, row, of_rows);
  stage_ahead();
  for (Step step = walk.first(); !walk.ended(step); step = walk.next(step)) {
    Accumulator<1, kSlicedStreamed> s, ds;
    clear(s);
    clear(ds);
    for (int i = 0; i < slices; ++i) {
      const uint32_t at = take();
      multiply_rows<T, kSlice>(s, at, warp * 16, at + kOwnedBytes, 0);
    }
    for (int i = 0; i < v_slices; ++i) {
      const uint32_t at = take();
      multiply_rows<T, kSlice>(ds, at, warp * 16, at + kOwnedBytes, 0);
    }
    const Statistics* of_columns = kKeys ? statistics(p, walk.seq.b, step.head) + step.row : nullptr;
    score_gradients<kKeys>(p.mask, walk, step, row, step.row, of_rows, of_columns, s, ds);
    uint32_t a[1][4];
    if constexpr (kKeys) {
#pragma unroll
      for (int slice = 0; slice < kColumnSlices; ++slice) {
        const uint32_t at = take() + kOwnedBytes;
#pragma unroll
        for (int n = 0; n < kSlicedStreamed / 16; ++n) {
          as_fragment<T>(a[0], s.c[0][2 * n], s.c[0][2 * n + 1]);
          multiply_columns<T, kSlice, kSlice>(second, slice * kSlice, a, at, n * 16, 0);
        }
      }
    }
#pragma unroll
    for (int slice = 0; slice < kColumnSlices; ++slice) {
      const uint32_t at = take() + kOwnedBytes;
#pragma unroll
      for (int n = 0; n < kSlicedStreamed / 16; ++n) {
        as_fragment<T>(a[0], ds.c[0][2 * n], ds.c[0][2 * n + 1]);
        multiply_columns<T, kSlice, kSlice>(first, slice * kSlice, a, at, n * 16, 0);
      }
    }
  }
  write_gradients<T, kKeys>(p, walk, row, column0, column0, first, second);
}

// ---- launching -----------------------------------------------------------------------------------------------------

template <class T, bool kKeys, int kEntry = 0>
Status run_gradients(const AttentionBackwardParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  const auto grid = [&](int owned, int64_t z) {
    return Grid{count_slots(kKeys ? s.total_k : s.total_q, s.batch, owned), kKeys ? s.kv_heads : s.heads, z};
  };
  if constexpr (kEntry < std::size(tiles<kKeys>())) {
    constexpr Tile kTile = tiles<kKeys>()[kEntry];
    constexpr int kShared = kTile.shared_bytes(kKeys);
    if (s.head_dim <= kTile.dim && s.v_head_dim <= kTile.v_dim && kShared <= device.shared_bytes)
      return launch(gradients<T, kKeys, kEntry>, grid(kTile.owned(), 1), kTile.threads(), kShared, device, p);
    return run_gradients<T, kKeys, kEntry + 1>(p, device);
  } else {
    const int64_t widest = kKeys && s.v_head_dim > s.head_dim ? s.v_head_dim : s.head_dim;
    constexpr int kColumns = sliced_columns(kKeys);
    return launch(sliced_gradients<T, kKeys>, grid(kSlicedOwned, (widest + kColumns - 1) / kColumns), kSlicedThreads,
                  2 * kSliceBytes, device, p);
  }
}

template <class T>
Status run(const AttentionBackwardParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  const Grid rows{(statistics_rows(s) + kPrepareRows - 1) / kPrepareRows, s.heads};
  if (Status error = launch(prepare<T>, rows, kPrepareThreads, 0, device, p)) return error;
  if (p.dsinks)
    if (Status error = launch(sink_gradients, {s.batch, s.heads}, kSinkThreads, kSinkThreads / 8, device, p))
      return error;
  if (Status error = run_gradients<T, true>(p, device)) return error;
  return run_gradients<T, false>(p, device);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& p, const Device&) {
  return (p.shape.heads * statistics_rows(p.shape) + kSlicedStreamed) * static_cast<int64_t>(sizeof(Statistics));
}

Status attention_backward(const AttentionBackwardParams& p, const Device& device) {
  if (p.shape.seq_q >= kMaxLength || p.shape.seq_k >= kMaxLength) return "sequences of 2^30 rows or more";
  switch (p.dtype) {
    case DType::bf16: return run<bf16>(p, device);
    case DType::f16: return run<f16>(p, device);
    default: return "no CUDA kernel for this dtype: bfloat16 and float16 have one";
  }
}

}  // namespace cuda
}  // namespace llmcore
