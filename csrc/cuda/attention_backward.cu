// The backward pass of attention by tiles (FlashAttention-2, arXiv 2307.08691), on mma.sync. With P the probabilities,
// rebuilt from q, k and the forward pass's lse:
//   dP = dO V^T,  delta = rowsum(dO * O) - dlse,  dS = P * (dP - delta),
//   dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.
//
// prepare (attention_backward_rows.cuh) writes delta and lse of each row to the workspace; dsinks come out of them.
// Then there are two ways (docs/cuda-attention-backward.md):
//   fused          `gradients` with CTAs that own keys: dK, dV, and dQ by atomic additions; finish_dq rounds it
//   deterministic  `gradients` with CTAs that own keys: dK, dV; once more with CTAs that own queries: dQ
// It is one kernel. A CTA keeps its rows' tile in shared memory and walks over the rows of the other side that it meets
// ("the stream"). The gradients of its own rows it sums in registers, always in the same order: the same bits in every
// run. For dQ, too, that costs S and dP a second time, 7 matrix products for 5.
#include "attention_backward_rows.cuh"

namespace llmcore {
namespace cuda {
namespace {

// ---- what a CTA owns, and whom it meets ----------------------------------------------------------------------------

struct Step {  // a tile of the stream
  int head, row;
  View view;
};

// Keys meet the queries of all heads of their group that see them, queries the keys that they see. The walk is the same
// for all threads, and looked at for each tile only: it stays in shared memory, and registers are for the gradients.
template <Pass kPass, int kOwned, int kStreamed>
struct Walk {
  static constexpr bool kKeys = owns_keys(kPass);
  int b;
  Sequence seq;
  Visibility visible;
  int kv_head, head, head_end;  // query heads [head, head_end)
  int owned_row;                // the first owned row
  Range range;                  // of the stream
  int start;                    // the row, of a tile of the stream, to begin with

  // False when there are no rows to own.
  __device__ bool begin(const AttentionBackwardParams& p) {
    Walk walk;
    if (!walk.find(p)) return false;
    if (threadIdx.x == 0) *this = walk;
    ptx::syncthreads();
    return true;
  }
  __device__ bool find(const AttentionBackwardParams& p) {
    static_assert(sizeof(Walk) <= kWalkBytes);
    const AttentionShape& s = p.shape;
    // Under a causal mask the first keys and the last queries have the most work: they go first.
    const int64_t slot = kKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int group = static_cast<int>(s.heads) / static_cast<int>(s.kv_heads), y = static_cast<int>(blockIdx.y);
    const Slots slots{kKeys ? s.cu_k : s.cu_q, kKeys ? s.seq_k : s.seq_q, kOwned};
    b = static_cast<int>(slots.sequence_of(slot, s.batch));
    seq = sequence(s, b);
    const int64_t row = (slot - slots.first(b)) * kOwned;
    if (row >= (kKeys ? seq.num_k : seq.num_q)) return false;
    owned_row = static_cast<int>(row);
    head = kKeys ? y * group : y;
    head_end = head + (kKeys ? group : 1);
    kv_head = head / group;
    visible = visibility(p.mask, seq, b);
    const int last = smaller(owned_row + kOwned, kKeys ? seq.num_k : seq.num_q) - 1;
    range = kKeys ? visible.queries_of(owned_row, last) : visible.keys_of(owned_row, last);
    start = first_tile();
    // CTAs that run at the same time should not add to the same queries. Under a causal mask or a window their ranges
    // begin apart. Those that begin at the first query are entered at one tile after another, and come to the tiles
    // before it in the end.
    if (kPass == Pass::fused && range.first == 0 && range.last >= 0)
      start = owned_row / kOwned % (range.last / kStreamed + 1) * kStreamed;
    return true;
  }
  __device__ int first_tile() const { return range.first / kStreamed * kStreamed; }
  __device__ Step first() const {
    if (range.last < range.first) return {head_end, 0, View::none};
    const Step s = seen({head, start, View::none});
    return s.view == View::none ? next(s) : s;
  }
  __device__ Step next(Step s) const {
    do {
      s.row += kStreamed;
      if (s.row > range.last) s.row = first_tile();
      if (s.row == start && ++s.head == head_end) break;
      s = seen(s);
    } while (s.view == View::none);
    return s;
  }
  __device__ Step seen(Step s) const {
    s.view = kKeys ? visible.of_tile(s.head, s.row, kStreamed, owned_row, kOwned)
                   : visible.of_tile(s.head, owned_row, kOwned, s.row, kStreamed);
    return s;
  }
  __device__ bool ended(const Step& s) const { return s.head == head_end; }
};

// The inputs as rows: q and dout, or k and v. `first` is the one of head size dim, the other has v_dim.
template <class T, class W>
PTX_DEVICE Rows<const T> query_rows(const AttentionBackwardParams& p, const W& w, int head, bool first) {
  return rows_of<const T>(first ? p.q : p.dout, first ? p.q_strides : p.dout_strides, w.b, w.seq.q_start, head,
                          w.seq.num_q, first ? p.shape.head_dim : p.shape.v_head_dim);
}
template <class T, class W>
PTX_DEVICE Rows<const T> key_rows(const AttentionBackwardParams& p, const W& w, bool first) {
  return rows_of<const T>(first ? p.k : p.v, first ? p.k_strides : p.v_strides, w.b, w.seq.k_start, w.kv_head,
                          w.seq.num_k, first ? p.shape.head_dim : p.shape.v_head_dim);
}
template <class T, bool kKeys, class W>
PTX_DEVICE Rows<const T> owned_rows(const AttentionBackwardParams& p, const W& w, bool first) {
  if constexpr (kKeys)
    return key_rows<T>(p, w, first);
  else
    return query_rows<T>(p, w, w.head, first);
}
template <class T, bool kKeys, class W>
PTX_DEVICE Rows<const T> streamed_rows(const AttentionBackwardParams& p, const W& w, const Step& s, bool first) {
  if constexpr (kKeys)
    return query_rows<T>(p, w, s.head, first);
  else
    return key_rows<T>(p, w, first);
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
      if (!kKeys && at < w.seq.num_q) x[m][half] = statistics(p, w.b, w.head)[at];
    }
}

// Writes dK and dV, or dQ.
template <class T, bool kKeys, int kBlocks, int kWidth, int kVWidth, class W>
PTX_DEVICE void write_gradients(const AttentionBackwardParams& p, const W& w, int row, int column, int v_column,
                                const Accumulator<kBlocks, kWidth>& first,
                                const Accumulator<kBlocks, kVWidth>& second) {
  const Sequence& s = w.seq;
  if constexpr (kKeys) {
    write(first, rows_of<T>(p.dk, p.dk_strides, w.b, s.k_start, w.kv_head, s.num_k, p.shape.head_dim), row, column,
          p.mask.scale);
    write(second, rows_of<T>(p.dv, p.dv_strides, w.b, s.k_start, w.kv_head, s.num_k, p.shape.v_head_dim), row, v_column,
          1.f);
  } else {
    write(first, rows_of<T>(p.dq, p.dq_strides, w.b, s.q_start, w.head, s.num_q, p.shape.head_dim), row, column,
          p.mask.scale);
  }
}

// Stores scores, in 16 bits, in a tile whose rows are the owned ones.
template <class T, int kStreamed, int kBlocks, int kStep>
PTX_DEVICE void show(uint8_t* tile, int row, int column, const Accumulator<kBlocks, kStep>& x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(
            tile + SharedTile<kStreamed>::at(row + m * 16 + half * 8 + lane / 4, column / 8 + n) + lane % 4 * 4) =
            pack2(T{}, x.c[m][n][2 * half], x.c[m][n][2 * half + 1]);
}

// Adds what the CTA's keys contribute to dQ of the streamed queries. `ds` is the tile that all warps have shown: keys
// down, queries across, so that A fragments of queries are read transposed. Each warp takes some rows and columns.
template <class T, int kEntry, class W>
PTX_DEVICE void add_dq(const AttentionBackwardParams& p, const W& walk, const Step& step, uint32_t ds, uint32_t keys) {
  constexpr BackwardTile kTile = kFusedTiles[kEntry];
  constexpr int kBlocks = kTile.dq_blocks(), kRows = kBlocks * 16, kColumns = kTile.dq_columns();
  constexpr int kRowParts = kTile.streamed() / kRows;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int local_row = warp % kRowParts * kRows, row = step.row + local_row, column = warp / kRowParts * kColumns;
  const Visibility& visible = walk.visible;
  if (row > walk.range.last || column >= p.shape.head_dim) return;
  // By position, these queries see the following ones of the CTA's keys, if any.
  Range seen = visible.keys_of(row, smaller(row + kRows, visible.num_q) - 1);
  seen = {larger(seen.first - walk.owned_row, 0), smaller(seen.last - walk.owned_row, kTile.owned() - 1)};
  if (seen.last < seen.first) return;
  Accumulator<kBlocks, kColumns> dq;
  clear(dq);
#pragma unroll 1
  for (int key = seen.first / 16 * 16; key <= seen.last; key += 16) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      ptx::ldmatrix_x4_trans(a[m], ds + SharedTile<kTile.streamed()>::at(key + lane / 16 * 8 + lane % 8,
                                                                         local_row / 8 + m * 2 + lane / 8 % 2));
    multiply_columns<T, kTile.dim, kColumns>(dq, 0, a, keys, key, column / 8);
  }
  const int64_t slot = sum_slots(p.shape).first(walk.b) + row / kSumRows;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    if (row + m * 16 > walk.range.last) break;
    float* sums = sums_of_rows(p, step.head, slot + m) + column / kSumColumns * kSums;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      if (column + n * 8 < p.shape.head_dim) ptx::red_add_warp(sums + n * kSums, dq.c[m][n]);
  }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

template <class T, Pass kPass, int kEntry>
__global__ void __launch_bounds__(tiles<kPass>()[kEntry].threads()) gradients(AttentionBackwardParams p) {
  constexpr bool kKeys = owns_keys(kPass);
  constexpr BackwardTile kTile = tiles<kPass>()[kEntry];
  constexpr int kDim = kTile.dim, kVDim = kTile.v_dim, kBlocks = kTile.blocks, kSplit = kTile.split, kStep = kTile.step;
  constexpr int kOwned = kTile.owned(), kStreamed = kTile.streamed(), kThreads = kTile.threads();
  constexpr int kWidth = kDim / kSplit, kVWidth = kVDim / kSplit;
  PTX_SHARED_MEMORY(shared);
  uint8_t *owned = shared + kWalkBytes, *streams = owned + kTile.owned_bytes(),
          *columns = streams + 2 * kTile.stream_bytes();
  uint8_t *shown_ds = columns + (kKeys ? 2 * kStreamed * 8 : 0), *shown_p = shown_ds + kTile.scores_bytes();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int local_row = thread / (32 * kSplit) * kBlocks * 16, part = thread / 32 % kSplit;  // of this warp

  using W = Walk<kPass, kOwned, kStreamed>;
  W& walk = *reinterpret_cast<W*>(shared);
  if (!walk.begin(p)) return;

  const auto stage_stream = [&](const Step& step, int buffer) {
    uint8_t* to = streams + buffer * kTile.stream_bytes();
    stage<T, kStreamed, kDim, kThreads>(to, streamed_rows<T, kKeys>(p, walk, step, true), step.row, 0);
    stage<T, kStreamed, kVDim, kThreads>(to + SharedTile<kDim>::bytes(kStreamed),
                                         streamed_rows<T, kKeys>(p, walk, step, false), step.row, 0);
    if (kKeys && thread < kStreamed / 2) {
      const int left = smaller(larger(walk.seq.num_q - step.row - 2 * thread, 0), 2);
      const Statistics* from = statistics(p, walk.b, step.head) + (left ? step.row + 2 * thread : 0);
      ptx::copy_async_16(ptx::shared_address(columns + buffer * kStreamed * 8 + thread * 16), from, left * 8);
    }
  };

  Accumulator<kBlocks, kWidth> first;                // dK or dQ
  Accumulator<kBlocks, kKeys ? kVWidth : 8> second;  // dV
  Statistics of_rows[kBlocks][2];
  clear(first);
  clear(second);
  load_statistics<kKeys>(p, walk, walk.owned_row + local_row, of_rows);

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
    constexpr int kAhead = kPass == Pass::fused && kSplit > 1 && kBlocks * kStep == 64 ? 1 : 2;  // 2 spills there
    multiply_rows<T, kDim, kAhead>(s, own, local_row, stream, part * kStep);
    multiply_rows<T, kVDim, kAhead>(ds, own_v, local_row, stream_v, part * kStep);
    const Statistics* of_columns = reinterpret_cast<const Statistics*>(columns + buffer * kStreamed * 8) + part * kStep;
    score_gradients<kKeys>(p.mask, walk, step, walk.owned_row + local_row, step.row + part * kStep, of_rows, of_columns,
                           s, ds);

    // P and dS go on as A fragments: straight from the registers, or by way of shared memory where a group's warps have
    // to see each other's. All warps have to see dS when dQ is formed.
    if constexpr (kTile.shown(kPass) > 0) show<T, kStreamed>(shown_ds, local_row, part * kStep, ds);
    if constexpr (kSplit > 1) {
      show<T, kStreamed>(shown_p, local_row, part * kStep, s);
      if constexpr (kPass == Pass::fused)
        ptx::syncthreads();
      else
        ptx::barrier_sync(1 + thread / (kSplit * 32), kSplit * 32);
    }
    const auto fragments = [&](uint32_t(&a)[kBlocks][4], bool of_ds, int n) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        if constexpr (kSplit > 1) {
          ptx::ldmatrix_x4(a[m], ptx::shared_address(of_ds ? shown_ds : shown_p) +
                                     SharedTile<kStreamed>::at(local_row + m * 16 + lane % 16, n * 2 + lane / 16));
        } else {
          const auto& x = of_ds ? ds.c[m] : s.c[m];
          as_a_fragment<T>(x[2 * n], x[2 * n + 1], a[m]);
        }
    };
    // Fragments in registers need constant indices; others are better not loaded far ahead.
    [[maybe_unused]] constexpr int kUnroll = kSplit > 1 ? 1 : kStreamed / 16;
    uint32_t a[kBlocks][4];
    if constexpr (kKeys) {
#pragma unroll(kUnroll)
      for (int n = 0; n < kStreamed / 16; ++n) {
        fragments(a, false, n);
        multiply_columns<T, kVDim, kVWidth>(second, 0, a, stream_v, n * 16, part * kVWidth / 8);
      }
    }
#pragma unroll(kUnroll)
    for (int n = 0; n < kStreamed / 16; ++n) {
      fragments(a, true, n);
      multiply_columns<T, kDim, kWidth>(first, 0, a, stream, n * 16, part * kWidth / 8);
    }
    if constexpr (kPass == Pass::fused) {
      if constexpr (kSplit == 1) ptx::syncthreads();
      add_dq<T, kEntry>(p, walk, step, ptx::shared_address(shown_ds), own);
    }
    step = next;
  }
  write_gradients<T, kKeys>(p, walk, walk.owned_row + local_row, part * kWidth, part * kVWidth, first, second);
}

// The same in slices of the head dimension, for a share of the gradients' columns. Slices pass through a ring of two:
// for each tile of the stream those that S is summed over, those of dP, then the columns that P and dS meet.
template <class T, Pass kPass>
__global__ void __launch_bounds__(kSlicedThreads) sliced_gradients(AttentionBackwardParams p) {
  constexpr bool kKeys = owns_keys(kPass);
  constexpr int kColumns = sliced_columns(kKeys), kColumnSlices = kColumns / kSlice;
  constexpr int kOwnedBytes = SharedTile<kSlice>::bytes(kSlicedOwned);
  PTX_SHARED_MEMORY(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, column0 = static_cast<int>(blockIdx.z) * kColumns;
  const auto slices_of = [](int64_t dim) { return static_cast<int>(ceil_div<int64_t>(dim, kSlice)); };
  const int slices = slices_of(p.shape.head_dim), v_slices = slices_of(p.shape.v_head_dim), summed = slices + v_slices;

  using W = Walk<kPass, kSlicedOwned, kSlicedStreamed>;
  W& walk = *reinterpret_cast<W*>(shared);
  if (!walk.begin(p)) return;
  const int row = walk.owned_row + warp * 16;

  // What is staged next: slice `ahead` of the tile `ahead_step`.
  Step ahead_step = walk.first();
  int ahead = 0, buffer = 0;
  const auto stage_ahead = [&] {
    if (!walk.ended(ahead_step)) {
      uint8_t* to = shared + kWalkBytes + buffer * kSliceBytes;
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
    const uint32_t here = ptx::shared_address(shared + kWalkBytes + buffer * kSliceBytes);
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
    const Statistics* of_columns = kKeys ? statistics(p, walk.b, step.head) + step.row : nullptr;
    score_gradients<kKeys>(p.mask, walk, step, row, step.row, of_rows, of_columns, s, ds);
    uint32_t a[1][4];
    if constexpr (kKeys) {
#pragma unroll
      for (int slice = 0; slice < kColumnSlices; ++slice) {
        const uint32_t at = take() + kOwnedBytes;
#pragma unroll
        for (int n = 0; n < kSlicedStreamed / 16; ++n) {
          as_a_fragment<T>(s.c[0][2 * n], s.c[0][2 * n + 1], a[0]);
          multiply_columns<T, kSlice, kSlice>(second, slice * kSlice, a, at, n * 16, 0);
        }
      }
    }
#pragma unroll
    for (int slice = 0; slice < kColumnSlices; ++slice) {
      const uint32_t at = take() + kOwnedBytes;
#pragma unroll
      for (int n = 0; n < kSlicedStreamed / 16; ++n) {
        as_a_fragment<T>(ds.c[0][2 * n], ds.c[0][2 * n + 1], a[0]);
        multiply_columns<T, kSlice, kSlice>(first, slice * kSlice, a, at, n * 16, 0);
      }
    }
  }
  write_gradients<T, kKeys>(p, walk, row, column0, column0, first, second);
}

// ---- launching -----------------------------------------------------------------------------------------------------

template <class T, Pass kPass, int kEntry = 0>
Status run_gradients(const AttentionBackwardParams& p, const Device& device) {
  constexpr bool kKeys = owns_keys(kPass);
  const AttentionShape& s = p.shape;
  const auto grid = [&](int owned, int64_t z) {
    return Grid{count_slots(kKeys ? s.total_k : s.total_q, s.batch, owned), kKeys ? s.kv_heads : s.heads, z};
  };
  if constexpr (kEntry < std::size(tiles<kPass>())) {
    constexpr BackwardTile kTile = tiles<kPass>()[kEntry];
    if (tile_for<kPass>(s.head_dim, s.v_head_dim, device.shared_bytes) == kEntry)
      return launch(gradients<T, kPass, kEntry>, grid(kTile.owned(), 1), kTile.threads(), kTile.shared_bytes(kPass),
                    device, p);
    return run_gradients<T, kPass, kEntry + 1>(p, device);
  } else if constexpr (kPass != Pass::fused) {
    const int64_t widest = kKeys && s.v_head_dim > s.head_dim ? s.v_head_dim : s.head_dim;
    constexpr int kColumns = sliced_columns(kKeys);
    return launch(sliced_gradients<T, kPass>, grid(kSlicedOwned, ceil_div<int64_t>(widest, kColumns)), kSlicedThreads,
                  kWalkBytes + 2 * kSliceBytes, device, p);
  } else {
    return "attention_backward: no tile";
  }
}

bool is_fused(const AttentionBackwardParams& p, const Device& device) {
  return !p.deterministic && tile_for<Pass::fused>(p.shape.head_dim, p.shape.v_head_dim, device.shared_bytes) <
                                 static_cast<int>(std::size(kFusedTiles));
}

template <class T>
Status run(const AttentionBackwardParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  const bool fused = is_fused(p, device);
  const Grid rows{ceil_div<int64_t>(statistics_rows(s), kPrepareRows), s.heads};
  if (Status error = launch(prepare<T>, rows, kPrepareThreads, 0, device, p, fused ? sums_of_head(s) : 0)) return error;
  if (p.dsinks)
    if (Status error = launch(sink_gradients, {s.batch, s.heads}, kSinkThreads, kSinkThreads / 8, device, p))
      return error;
  if (!fused) {
    if (Status error = run_gradients<T, Pass::keys>(p, device)) return error;
    return run_gradients<T, Pass::queries>(p, device);
  }
  if (Status error = run_gradients<T, Pass::fused>(p, device)) return error;
  const int64_t slots = count_slots(s.total_q, s.batch, kSumRows);
  return launch(finish_dq<T>, {ceil_div<int64_t>(slots, kFinishSlots), s.heads}, kFinishThreads, 0, device, p);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& p, const Device& device) {
  const int64_t sums = is_fused(p, device) ? p.shape.heads * sums_of_head(p.shape) : 0;
  return statistics_bytes(p.shape) + sums * static_cast<int64_t>(sizeof(float));
}

Status attention_backward(const AttentionBackwardParams& p, const Device& device) {
  if (p.shape.seq_q >= kNoEnd || p.shape.seq_k >= kNoEnd) return "sequences of 2^30 rows or more";
  switch (p.dtype) {
    case DType::bf16: return run<bf16>(p, device);
    case DType::f16: return run<f16>(p, device);
    default: return "no CUDA kernel for this dtype: bfloat16 and float16 have one";
  }
}

}  // namespace cuda
}  // namespace llmcore
