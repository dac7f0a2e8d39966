// Flash attention, forward, on tensor cores by mma.sync (sm_80 and later); docs/cuda-attention.md draws the data flow.
//
// A CTA takes a block of query rows of one sequence and KV head (attention_common.cuh: the query heads that share a KV
// head are rows of the same tile) and goes over the tiles of keys that some of its rows see. Each warp owns 16 or 32
// rows: it forms their scores, keeps the running maximum and sum in registers and multiplies the probabilities, packed
// in place, with the values. K and V items follow one another through a ring of buffers in shared memory: while one is
// worked on, cp.async fills the next two, and one barrier for each item is all the synchronisation there is.
#include "attention_common.cuh"
#include "attention_decode.cuh"
#include "attention_tiles.cuh"
#include "launch.cuh"

namespace llmcore {
namespace cuda {
namespace {

// The maximum that exponents are taken against may lag behind by so many powers of 2 before the accumulators are
// rescaled (FlashAttention-4). Exact: sum and accumulators lag alike. Probabilities stay below 2^8, sums of them far
// below the largest float, and a 16-bit float is as precise at 2^8 as at 1.
constexpr float kLag = 8.f;

constexpr int64_t kMaxHeadDim = 576;  // 64 rows of queries in 72 KiB of shared memory

// What a CTA is to do; at the start of its shared memory.
struct Plan {
  Task task;
  int last_row;      // of the task
  KeyRange keys;     // that some row of it sees by position
  RowsView view[8];  // of each warp
};
constexpr int kPlanBytes = 256;
static_assert(sizeof(Plan) <= kPlanBytes && kPlanBytes % 128 == 0, "tiles behind it start at the first bank");

struct Rows {  // which tensors can be moved 16 bytes at a time
  bool q, k, v, out;
};

// Scores of a warp's rows -> unnormalised probabilities, in place. `top`: the exponent they are taken against; `total`:
// the lane's own share of the row's sum; both for the rows lane / 4 and lane / 4 + 8 of each fragment.
template <int kFragments, int kScoreTiles, int kOutTiles>
PTX_DEVICE void softmax(float factor, float (&s)[kFragments][kScoreTiles][4], float (&top)[kFragments][2],
                        float (&total)[kFragments][2], float (&out)[kFragments][kOutTiles][4]) {
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = kNegInf;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) highest = fmaxf(highest, fmaxf(s[f][j][2 * half], s[f][j][2 * half + 1]));
      highest = row_max(highest) * factor;
      if (highest > top[f][half] + kLag) {
        const float rescale = ptx::exp2(top[f][half] - highest);  // 0 when this is the first key seen
        top[f][half] = highest;
        total[f][half] *= rescale;
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) out[f][j][2 * half] *= rescale, out[f][j][2 * half + 1] *= rescale;
      }
      const float base = top[f][half] == kNegInf ? 0.f : top[f][half];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[f][j][e] = ptx::exp2(fmaf(s[f][j][e], factor, -base));
          total[f][half] += s[f][j][e];
        }
    }
}

template <class T, int kIndex>
__global__ void __launch_bounds__(kForwardTiles[kIndex].threads(), kForwardTiles[kIndex].ctas)
    forward(AttentionParams p, Rows copies) {
  constexpr Tile kTile = kForwardTiles[kIndex];
  constexpr bool kAny = kTile.any_head_dim();
  constexpr int kRows = kTile.rows(), kThreads = kTile.threads(), kKeys = kTile.keys, kFragments = kTile.fragments;
  constexpr int kKSteps = kTile.k_columns / 16, kVSteps = kTile.v_columns / 16;  // of an item
  constexpr int kKPitch = row_pitch(kTile.k_columns), kVPitch = row_pitch(kTile.v_columns);
  constexpr int kOutTiles = kTile.out_columns() / 8, kOutPitch = row_pitch(kTile.out_columns());
  const AttentionShape& shape = p.shape;
  const AttentionMask& mask = p.mask;

  // What is the same for a whole warp and seldom needed stays in shared memory: accumulators and scores take nearly all
  // registers.
  PTX_SHARED_MEMORY(shared);
  Plan& plan = *reinterpret_cast<Plan*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = 16 * kFragments * warp;  // its first, within the tile
  const Band band = band_of(mask);
  {
    Task found;
    if (!find_task(shape, kRows, blockIdx.x, gridDim.x, found) || found.first_row >= found.num_rows) return;
    const int first = found.first_row + warp_row;
    if (lane == 0) plan.view[warp] = view_rows(band, found, first, first + 16 * kFragments - 1);
    if (threadIdx.x == 0) {
      plan.task = found;
      plan.last_row = smaller(found.first_row + kRows, found.num_rows) - 1;
      plan.keys = view_rows(band, found, found.first_row, plan.last_row).any;
    }
    ptx::syncthreads();
  }
  const Task& task = plan.task;
  const RowsView& view = plan.view[warp];
  const int head_dim = static_cast<int>(shape.head_dim), v_begin = static_cast<int>(blockIdx.y) * kTile.out_columns();
  const int v_dim = smaller(static_cast<int>(shape.v_head_dim) - v_begin, kTile.out_columns());
  const int k_items = kAny ? ceil_div(head_dim, kTile.k_columns) : 1;
  const int v_items = kAny ? ceil_div(v_dim, kTile.v_columns) : 1;

  // Shared memory: the plan, the queries (in the end the output), the ring.
  const int q_pitch = kAny ? row_pitch(head_dim) : kKPitch;
  const uint32_t address = ptx::shared_address(shared), ring = kPlanBytes + kRows * larger(q_pitch, kOutPitch);

  // ---- the producer: brings one item after the other into the ring. With one K and one V item in a tile, the caller
  // knows which is next.
  const auto place_of_key = [&](const RowStrides& strides, const float* scales, int key) {
    const int64_t head = task.kv_head * strides.head;
    if (!shape.block_table)
      return RowPlace{head + task.b * strides.batch + (task.seq.k_start + key) * strides.row, 1.f};
    const int block_size = static_cast<int>(shape.block_size), in_block = key % block_size;
    const int64_t block = shape.block_table[task.b * shape.table_stride + key / block_size];
    const float factor = scales ? scales[(block * block_size + in_block) * shape.kv_heads + task.kv_head] : 1.f;
    return RowPlace{head + block * strides.batch + in_block * strides.row, factor};
  };
  KeyTiles<kKeys> tiles;
  tiles.start(plan.keys);
  int item = k_items + v_items - 1;  // of the tile it is at: K items, then V items
  const auto produce = [&](int slot, bool is_k) {
    if (kAny ? ++item == k_items + v_items : is_k) {
      tiles.advance(mask, task, plan.last_row, plan.keys);
      item = 0;
    }
    if (tiles.at == kNoTile) return;
    const int first_key = tiles.at * kKeys, keys = smaller(task.seq.num_k - first_key, kKeys);
    const uint32_t to = ring + slot * kTile.slot_bytes();
    if (kAny ? item < k_items : is_k) {
      const int column = kAny ? item * kTile.k_columns : 0;
      const auto place = [&](int i) { return place_of_key(p.k_strides, p.k_scale, first_key + i); };
      stage_rows<T, kKeys, kTile.k_columns, kThreads>(shared, to, kKPitch, {p.k, p.kv_dtype, copies.k}, keys, column,
                                                      head_dim, place);
    } else {
      const int column = kAny ? v_begin + (item - k_items) * kTile.v_columns : 0;
      const auto place = [&](int i) { return place_of_key(p.v_strides, p.v_scale, first_key + i); };
      stage_rows<T, kKeys, kTile.v_columns, kThreads>(shared, to, kVPitch, {p.v, p.kv_dtype, copies.v}, keys, column,
                                                      static_cast<int>(shape.v_head_dim), place);
    }
  };
  // Waits for the next item to be worked on and returns its address. Behind the barrier nobody reads the item before it
  // any longer, so its place takes the item after the next: of the same kind, where a tile has one item of each.
  int slot = kSlots - 1;
  const auto next_item = [&](bool is_k) {
    ptx::copy_wait<kSlots - 2>();
    ptx::syncthreads();
    const int free = slot;
    slot = slot == kSlots - 1 ? 0 : slot + 1;
    produce(free, is_k);
    ptx::copy_commit();
    return address + ring + slot * kTile.slot_bytes();
  };

  // ---- what each warp holds
  const int first_row = task.first_row + warp_row;
  const uint32_t q_lane = lane_offset_a(q_pitch), k_lane = lane_offset_b(kKPitch), v_lane = lane_offset_a(kVPitch);
  float out[kFragments][kOutTiles][4] = {}, top[kFragments][2], total[kFragments][2];
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[f][half] = kNegInf;
      total[f][half] = 0.f;
      if (mask.sinks) {  // a sink is a score whose value is the zero vector; one of the row's four lanes counts it
        const int row = first_row + 16 * f + 8 * half + lane / 4;
        top[f][half] = mask.sinks[task.kv_head * task.group + row % task.group] * kLog2e;
        total[f][half] = lane % 4 == 0 ? 1.f : 0.f;
      }
    }
  const auto load_queries = [&](int step, uint32_t(&a)[kFragments][4]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      ptx::ldmatrix_x4(a[f], address + kPlanBytes + (warp_row + 16 * f) * q_pitch + at_step(q_lane, step));
  };
  uint32_t queries[kTile.queries_in_registers ? kKSteps : 1][kFragments][4];

  // ---- the first copies
  produce(0, true);
  if (tiles.at != kNoTile) {
    const auto place = [&](int i) {
      const int row = task.first_row + i, query = row / task.group, head = task.kv_head * task.group + row % task.group;
      return RowPlace{
          task.b * p.q_strides.batch + (task.seq.q_start + query) * p.q_strides.row + head * p.q_strides.head, 1.f};
    };
    for (int column = 0; column < (kAny ? head_dim : 1); column += kTile.k_columns)
      stage_rows<T, kRows, kTile.k_columns, kThreads>(shared, kPlanBytes + 2 * column, q_pitch,
                                                      {p.q, p.q_dtype, copies.q}, task.num_rows - task.first_row,
                                                      column, head_dim, place);
    ptx::copy_commit();
    produce(1, false);
    ptx::copy_commit();
    if constexpr (kTile.queries_in_registers) {
      ptx::copy_wait<1>();
      ptx::syncthreads();
#pragma unroll
      for (int step = 0; step < kKSteps; ++step) load_queries(step, queries[step]);
    }
  }

  // ---- the tiles of keys. Behind the last item of one, the producer is at the next.
  for (int at = tiles.at; at != kNoTile; at = tiles.at) {
    const int first_key = at * kKeys, last_key = first_key + kKeys - 1;
    if (first_key > view.any.last || last_key < view.any.first) {  // none of the warp's rows sees any of it
      for (int i = 0; i < k_items + v_items; ++i) next_item(i < k_items);
      continue;
    }
    float s[kFragments][kKeys / 8][4] = {};
    for (int i = 0; i < k_items; ++i) {
      const uint32_t k = next_item(true);
      const int steps = kAny ? ceil_div(smaller(head_dim - i * kTile.k_columns, kTile.k_columns), 16) : kKSteps;
#pragma unroll
      for (int step = 0; step < kKSteps; ++step) {
        if (kAny && step >= steps) break;
        uint32_t from_shared[kFragments][4];
        if constexpr (!kTile.queries_in_registers) load_queries(i * kKSteps + step, from_shared);
        const auto& q = kTile.queries_in_registers ? queries[step] : from_shared;
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, k + 16 * n * kKPitch + at_step(k_lane, step));
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            ptx::mma(T{}, s[f][2 * n], q[f], b[0], b[1]);
            ptx::mma(T{}, s[f][2 * n + 1], q[f], b[2], b[3]);
          }
        }
      }
    }

    if (ready_first(mask)) ready_scores(mask, s);
    const int key = first_key + 2 * (lane % 4);
    if (first_key < view.all.first || last_key > view.all.last) {
#pragma unroll
      for (int i = 0; i < 2 * kFragments; ++i) {
        const int query = (first_row + 8 * i + lane / 4) / task.group;
        mask_by_position(visible_keys(band, task.seq.num_k, position_of(task.seq, query)), key, i % 2, s[i / 2]);
      }
    }
    if (mask.block_mask) {
#pragma unroll
      for (int i = 0; i < 2 * kFragments; ++i)
        mask_by_blocks(mask, task, first_row + 8 * i + lane / 4, key, i % 2, s[i / 2]);
    }
    softmax(exponent_factor(mask), s, top, total, out);
    uint32_t probabilities[kFragments][kKeys / 16][4];
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) as_a_fragment<T>(s[f][2 * n], s[f][2 * n + 1], probabilities[f][n]);

#pragma unroll
    for (int i = 0; i < kTile.v_items; ++i) {
      if (kAny && i >= v_items) break;
      const uint32_t v = next_item(false);
      const int steps = kAny ? ceil_div(smaller(v_dim - i * kTile.v_columns, kTile.v_columns), 16) : kVSteps;
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n)
#pragma unroll
        for (int step = 0; step < kVSteps; ++step) {
          if (kAny && step >= steps) break;
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, v + 16 * n * kVPitch + at_step(v_lane, step));
          const int column = 2 * (i * kVSteps + step);
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            ptx::mma(T{}, out[f][column], probabilities[f][n], b[0], b[1]);
            ptx::mma(T{}, out[f][column + 1], probabilities[f][n], b[2], b[3]);
          }
        }
    }
  }

  // ---- the output. It goes through shared memory, where the queries of the same warp were, to leave in whole rows.
  ptx::syncwarp();
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = warp_row + 16 * f + 8 * half + lane / 4, row = task.first_row + local;
      const float sum = row_sum(total[f][half]), inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j)
        *reinterpret_cast<uint32_t*>(shared + kPlanBytes + chunk_offset(kOutPitch, local, j) + lane % 4 * 4) =
            pack2(T{}, out[f][j][2 * half] * inverse, out[f][j][2 * half + 1] * inverse);
      if (p.lse && lane % 4 == 0 && row < task.num_rows && blockIdx.y == 0) {
        const int64_t query = task.seq.q_start + row / task.group, head = task.kv_head * task.group + row % task.group;
        p.lse[task.b * p.lse_batch + head * p.lse_head + query] =
            sum == 0.f ? kNegInf : top[f][half] * kLn2 + logf(sum);
      }
    }
  ptx::syncwarp();
  for (int i = lane; i < 16 * kFragments * (kTile.out_columns() / 8); i += 32) {
    const int local = warp_row + i / (kTile.out_columns() / 8), chunk = i % (kTile.out_columns() / 8);
    const int row = task.first_row + local, count = smaller(v_dim - 8 * chunk, 8);
    if (row >= task.num_rows || count <= 0) continue;
    T* to = static_cast<T*>(p.out) + task.b * p.out_strides.batch +
            (task.seq.q_start + row / task.group) * p.out_strides.row +
            (task.kv_head * task.group + row % task.group) * p.out_strides.head + v_begin + 8 * chunk;
    const ptx::Vec16 x =
        *reinterpret_cast<const ptx::Vec16*>(shared + kPlanBytes + chunk_offset(kOutPitch, local, chunk));
    if (copies.out && count == 8) {
      ptx::store_global_16(to, x);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) to[e] = T{static_cast<uint16_t>(x.x[e / 2] >> 16 * (e % 2))};
    }
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------

bool rows_fit(const void* base, const RowStrides& s) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && s.batch % 8 == 0 && s.row % 8 == 0 && s.head % 8 == 0;
}

template <class T, int kIndex = 0>
Status with_tile(const AttentionParams& p, const Device& device) {
  constexpr Tile kTile = kForwardTiles[kIndex];
  const int64_t tasks = task_bound(p.shape, kTile.rows()) * p.shape.kv_heads;
  if (tasks > INT32_MAX) return "attention: more blocks of queries than a grid may have";
  const int q_pitch = row_pitch(kTile.any_head_dim() ? static_cast<int>(p.shape.head_dim) : kTile.k_columns);
  const int shared_bytes =
      kPlanBytes + kTile.rows() * larger(q_pitch, row_pitch(kTile.out_columns())) + kSlots * kTile.slot_bytes();
  if constexpr (!kTile.any_head_dim())  // which is the last of the table, and small enough for any device
    if (ceil_div<int64_t>(p.shape.head_dim, 16) * 16 != kTile.head_dim ||
        ceil_div<int64_t>(p.shape.v_head_dim, 16) * 16 != kTile.v_head_dim || shared_bytes > device.shared_bytes)
      return with_tile<T, kIndex + 1>(p, device);
  const bool same_type = p.kv_dtype == p.q_dtype && !p.k_scale;
  const Rows copies{rows_fit(p.q, p.q_strides), same_type && rows_fit(p.k, p.k_strides),
                    same_type && rows_fit(p.v, p.v_strides), rows_fit(p.out, p.out_strides)};
  return launch(forward<T, kIndex>, {tasks, ceil_div<int64_t>(p.shape.v_head_dim, kTile.out_columns())},
                kTile.threads(), shared_bytes, device, p, copies);
}

}  // namespace

int64_t attention_forward_workspace(const AttentionParams& p, const Device& device) {
  return attention_decode_serves(p, device) ? attention_decode_workspace(p, device) : 0;
}

Status attention_forward(const AttentionParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  if (s.batch == 0 || s.total_q == 0) return nullptr;

  if (attention_decode_serves(p, device)) return attention_decode(p, device);

  if (s.head_dim > kMaxHeadDim) return "attention: head sizes beyond 576 have no CUDA kernel";
  if (s.total_q * (s.heads / s.kv_heads) >= kNoEnd || larger(s.seq_k, s.table_stride * s.block_size) >= kNoEnd)
    return "attention: sequences of 2^30 rows or more have no CUDA kernel";
  switch (p.q_dtype) {
    case DType::bf16: return with_tile<bf16>(p, device);
    case DType::f16: return with_tile<f16>(p, device);
    default: return "float32 attention has no CUDA kernel";
  }
}

}  // namespace cuda
}  // namespace llmcore
