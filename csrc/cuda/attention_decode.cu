// Decode attention over a paged cache, on any GPU from sm_80 up: the few new rows of a sequence, times all query heads
// of a KV head, are the M tile of mma.m16n8k16, so that the cache, which bounds the speed, is read once for all of
// them. The keys of a sequence are split among CTAs; a second kernel joins the splits in their order.
// docs/cuda-decode.md tells it from above.
#include "attention_decode.cuh"

#include <type_traits>

#include "attention_decode_warp.cuh"
#include "launch.cuh"

namespace llmcore {
namespace cuda {
namespace decode {
namespace {

// The keys that query i sees by position, [first, last].
struct KeyRange {
  int first, last;
};
PTX_DEVICE KeyRange visible_keys(const AttentionMask& m, int64_t i, int64_t num_q, int64_t num_k) {
  const int64_t position = i + num_k - num_q;
  int64_t first = 0, last = num_k - 1;
  if (m.causal && position < last) last = position;
  if (m.window) {
    if (position - m.window + 1 > first) first = position - m.window + 1;
    if (position + m.window - 1 < last) last = position + m.window - 1;
  }
  return {static_cast<int>(first), static_cast<int>(last)};
}

// grid: (batch * splits, kv_heads)
template <class T, class C, int Index>
__global__ void __launch_bounds__(Layout<C, Index>::kThreads, Layout<C, Index>::kCtas)
    attend(AttentionParams p, Plan plan) {
  using L = Layout<C, Index>;
  constexpr Tile kTile = L::kTile;
  PTX_SHARED_MEMORY(memory);
  const AttentionShape& s = p.shape;
  const int b = static_cast<int>(blockIdx.x) / plan.splits, split = static_cast<int>(blockIdx.x) % plan.splits;
  const int kv_head = static_cast<int>(blockIdx.y), num_k = s.kv_lens[b];
  // The sequence's first query among all. Asked for where it is needed, so as not to take a register.
  const auto query0 = [&] { return s.cu_q ? s.cu_q[b] : b * static_cast<int>(s.seq_q); };
  const int num_q = s.cu_q ? s.cu_q[b + 1] - query0() : static_cast<int>(s.seq_q);
  const int group = static_cast<int>(s.heads / s.kv_heads), rows = num_q * group;

  Warp<T, C, Index> w;
  w.memory = memory;
  w.warp = static_cast<int>(threadIdx.x) / 32;
  w.lane = static_cast<int>(threadIdx.x) % 32;
  w.column_group = w.warp % kTile.column_groups;
  w.row_tile = w.warp / kTile.column_groups % L::kRowTiles;
  w.key_group = w.warp / kTile.column_groups / L::kRowTiles;

  // One round, unless cu_q gives one sequence the rows of others.
  for (int row0 = 0; row0 < rows; row0 += kTile.rows) {
    const int row_end = row0 + kTile.rows < rows ? row0 + kTile.rows : rows;
    // The union of what the rows see; each split takes the same number of tiles, the last ones less or nothing.
    const int first = visible_keys(p.mask, row0 / group, num_q, num_k).first;
    const int last = visible_keys(p.mask, (row_end - 1) / group, num_q, num_k).last;
    const int all_tiles = last < first ? 0 : (last - first) / kTile.keys + 1;
    const int share = (all_tiles + plan.splits - 1) / plan.splits;
    const int tile0 = split * share;
    const int tiles = clamp(all_tiles - tile0, 0, share);
    const int key0 = first + tile0 * kTile.keys;

    // Where the two rows of a lane stand in plan.stats; -1: rows that are padding.
    const auto place = [&](int i) -> int64_t {
      const int row = row0 + w.row_tile * 16 + w.lane / 4 + 8 * i;
      if (row >= row_end) return -1;
      return ((query0() + row / group) * s.heads + kv_head * group + row % group) * plan.splits + split;
    };
    if (tiles == 0) {  // nothing but the neutral element: the sums will not be read
      if (w.leads())
        for (int i = 0; i < 2; ++i)
          if (place(i) >= 0) plan.stats[place(i)] = {-kInfinity, 0.f};
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + w.row_tile * 16 + w.lane / 4 + 8 * i;
      const KeyRange seen = visible_keys(p.mask, row / group, num_q, num_k);
      w.first_key[i] = seen.first;
      w.last_key[i] = row < row_end ? seen.last : -1;
      w.highest[i] = -kInfinity;
      w.total[i] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < L::kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w.acc[n][i] = 0.f;

    RowFinder<C, L> finder(p, memory, b, kv_head, key0, last);
    const auto copy = [&](int i) {
      if (i < tiles) {
        uint8_t* stage = memory + L::kStage0 + i % L::kStages * L::kStage;
        copy_tile<T, C, typename L::K, kTile.keys, L::kThreads>(
            stage, p.k, finder.rows(i), 0, static_cast<int>(s.head_dim), p.kv_dtype, plan.k_vectors);
        if constexpr (!L::kTile.latent)
          copy_tile<T, C, typename L::V, kTile.keys, L::kThreads>(
              stage + L::kV, p.v, finder.rows(i), 1, static_cast<int>(s.v_head_dim), p.kv_dtype, plan.v_vectors);
      }
      ptx::copy_commit();  // a group for every tile, so that they can be counted
    };

    // The queries, in the group of the first tile.
    for (int i = static_cast<int>(threadIdx.x); i < kTile.rows * L::Q::kChunks; i += L::kThreads) {
      const int r = i / L::Q::kChunks, chunk = i % L::Q::kChunks, row = row0 + r;
      const int count = row < row_end ? static_cast<int>(s.head_dim) : 0;
      uint8_t* at = memory + L::Q::at(r, chunk);
      const int64_t query = row / group + (s.cu_q ? query0() : 0);
      const T* q = static_cast<const T*>(p.q) + b * p.q_strides.batch + query * p.q_strides.row +
                   (kv_head * group + row % group) * p.q_strides.head;
      if constexpr (kEightBit<C>) {
        ptx::Vec16 v{};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = chunk / 2 * 16 + key_column(chunk % 2 * 8 + e);
          if (column < count) v.x[e / 2] |= static_cast<uint32_t>(q[column].bits) << 16 * (e % 2);
        }
        *reinterpret_cast<ptx::Vec16*>(at) = v;
      } else if (plan.q_vectors) {
        const int size = clamp(2 * (count - 8 * chunk), 0, 16);
        ptx::copy_async_16(ptx::shared_address(at), size ? q + 8 * chunk : p.q, size);
      } else {
        *reinterpret_cast<ptx::Vec16*>(at) = converted_chunk<T>(q, p.q_dtype, 8 * chunk, count);
      }
    }

    finder.look_up(0);
#pragma unroll
    for (int i = 0; i < L::kStages - 1; ++i) {
      finder.publish(i);
      finder.publish_scales(i);
      finder.look_up(i + 1);
      ptx::syncthreads();
      copy(i);
    }
    finder.publish(L::kStages - 1);
    finder.look_up(L::kStages);
    for (int i = 0; i < tiles; ++i) {
      ptx::copy_wait<L::kStages - 2>();
      // Tile i is here for everyone, everyone is done with tile i - 1, and the rows of the next tile are published.
      ptx::syncthreads();
      const int ahead = i + L::kStages - 1;
      finder.publish_scales(ahead);
      copy(ahead);
      finder.publish(ahead + 1);
      finder.look_up(ahead + 2);
      const uint8_t* stage = memory + L::kStage0 + i % L::kStages * L::kStage;
      const auto* scales = reinterpret_cast<const KeyScales*>(memory + L::kScales0) + i % L::kStages * kTile.keys;
      float scores[L::kGroupKeys / 8][4];
      w.scores(stage, scores);
      w.softmax(p.mask, key0 + i * kTile.keys, scales, scores);
      w.add_values(stage, scores);
    }
    ptx::copy_wait<0>();
    ptx::syncthreads();  // the stages are free
    w.finish(plan, {place(0), place(1)});
    ptx::syncthreads();  // and again, for another round
  }
}

// Joins the splits of one row and head: grid (total_q * heads), a thread for 4 columns. The lanes of each warp share
// the splits among them and hand the weights around.
template <class T>
__global__ void combine(AttentionParams p, Plan plan) {
  const AttentionShape& s = p.shape;
  const int64_t row = blockIdx.x / s.heads, head = blockIdx.x % s.heads,
                place = blockIdx.x * static_cast<int64_t>(plan.splits);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowStats* stats = plan.stats + place;
  const float sink = p.mask.sinks ? p.mask.sinks[head] * kLog2e : -kInfinity;

  float top = sink;
  int used = 0;  // splits before the last that saw a key: their sums have been written
  for (int i = lane; i < plan.splits; i += 32) {
    top = fmaxf(top, stats[i].highest);
    if (stats[i].total != 0.f) used = i + 1;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    top = fmaxf(top, ptx::shfl_xor(top, step));
    const int other = static_cast<int>(ptx::shfl_xor(static_cast<uint32_t>(used), step));
    used = other > used ? other : used;
  }
  const float base = top == -kInfinity ? 0.f : top;
  float total = ptx::exp2(sink - base), sum[4] = {};
  const int64_t column = 4 * static_cast<int64_t>(threadIdx.x);
  for (int first = 0; first < used; first += 32) {
    float mine = 0.f, mine_total = 0.f;
    if (first + lane < used) {
      const RowStats x = stats[first + lane];
      mine = ptx::exp2(x.highest - base);
      mine_total = x.total * mine;
    }
    const int count = used - first < 32 ? used - first : 32;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float weight = ptx::shfl(mine, i);
      total += ptx::shfl(mine_total, i);
      if (column < plan.width) {
        const ptx::Vec16 v = ptx::load_global_16(plan.sums + (place + first + i) * plan.width + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += weight * ptx::from_bits(v.x[j]);
      }
    }
  }
  const int64_t b = s.cu_q ? 0 : row / s.seq_q, query = s.cu_q ? row : row % s.seq_q;
  T* out = static_cast<T*>(p.out) + b * p.out_strides.batch + query * p.out_strides.row + head * p.out_strides.head;
  const float factor = total == 0.f ? 0.f : 1.f / total;
  for (int j = 0; j < 4; ++j)
    if (column + j < s.v_head_dim) out[column + j] = from_float<T>(sum[j] * factor);
  if (p.lse && threadIdx.x == 0)
    p.lse[b * p.lse_batch + head * p.lse_head + query] = total == 0.f ? -kInfinity : top * kLn2 + logf(total);
}

// ---- launching -----------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Query heads that share a KV head, for all rows of a sequence. cu_q is on the device: with as many rows as sequences
// it is taken to give each of them one, which is what decoding does; others are served too, only not as fast.
int64_t rows_of(const AttentionShape& s) { return s.heads / s.kv_heads * (s.cu_q ? 1 : s.seq_q); }

bool is_latent(const AttentionParams& p) {
  return p.k == p.v && p.k_scale == p.v_scale && p.k_strides.batch == p.v_strides.batch &&
         p.k_strides.row == p.v_strides.row && p.k_strides.head == p.v_strides.head &&
         p.shape.v_head_dim <= p.shape.head_dim;
}

// The tile of a call, or -1. Where k and v lie is not known before the call itself, so `latent` is asked apart.
int tile_for(const AttentionParams& p, bool latent) {
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& t = kTiles[i];
    if (p.shape.head_dim <= t.head && p.shape.v_head_dim <= t.v_head && rows_of(p.shape) <= t.rows &&
        (!t.latent || latent) && tile_exists(has_scales(p.kv_dtype), i))
      return i;
  }
  return -1;
}

// f(std::integral_constant<int, i>) of the tile that is chosen.
template <class C, int I = 0, class F>
Status with_tile(int chosen, const F& f) {
  if constexpr (I < kNumTiles) {
    if constexpr (tile_exists(kEightBit<C>, I))
      if (chosen == I) return f(std::integral_constant<int, I>());
    return with_tile<C, I + 1>(chosen, f);
  } else {
    return "no tile for this head size";
  }
}

bool rows_aligned(const void* p, const RowStrides& s, int64_t element) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && s.batch * element % 16 == 0 && s.row * element % 16 == 0 &&
         s.head * element % 16 == 0;
}

// As many splits as fill the device once, while each has keys enough to hide its start behind. kv_lens is on the
// device, so the table's size must do for a bound; the CTAs of a shorter sequence share what there is.
int choose_splits(const AttentionParams& p, const Device& device, int ctas) {
  constexpr int64_t kMinKeys = 128;
  const AttentionShape& s = p.shape;
  int64_t keys = s.table_stride * s.block_size;
  const int64_t queries = s.cu_q ? s.total_q : s.seq_q;
  if (p.mask.window && p.mask.window < keys && 2 * p.mask.window + queries < keys) keys = 2 * p.mask.window + queries;
  const int64_t most = divide_up(keys, kMinKeys), tasks = s.batch * s.kv_heads;
  const int64_t room = ctas * device.multiprocessors / (tasks ? tasks : 1);
  const int64_t splits = room < most ? room : most;
  return static_cast<int>(splits > 1 ? splits : 1);
}

template <class L>
Plan make_plan(const AttentionParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  Plan plan{};
  plan.splits = choose_splits(p, device, L::kCtas);
  plan.width = divide_up(s.v_head_dim, 16) * 16;
  plan.q_vectors = rows_aligned(p.q, p.q_strides, 2);
  const bool as_they_are = p.kv_dtype == p.q_dtype || has_scales(p.kv_dtype);
  const int64_t element = has_scales(p.kv_dtype) ? 1 : 2;
  plan.k_vectors = as_they_are && rows_aligned(p.k, p.k_strides, element);
  plan.v_vectors = as_they_are && rows_aligned(p.v, p.v_strides, element);
  const int64_t partials = s.total_q * s.heads * plan.splits;
  plan.sums = static_cast<float*>(p.workspace);
  plan.stats = reinterpret_cast<RowStats*>(plan.sums + partials * plan.width);
  return plan;
}

// f(C()) of the type that the elements of the caches have in shared memory.
template <class T, class F>
auto with_cache_type(const AttentionParams& p, const F& f) {
  if (p.kv_dtype == DType::i8) return f(int8_t{});
  if (p.kv_dtype == DType::f8) return f(f8{});
  return f(T{});
}

// The layouts of 16-bit types are the same, so one of them will do to ask for sizes.
bool tile_fits(const AttentionParams& p, const Device& device) {
  return with_cache_type<f16>(p, [&](auto c) {
    bool fits = false;
    with_tile<decltype(c)>(tile_for(p, is_latent(p)), [&](auto index) -> Status {
      fits = Layout<decltype(c), decltype(index)::value>::kBytes <= device.shared_bytes;
      return nullptr;
    });
    return fits;
  });
}

template <class T, class C>
Status run(const AttentionParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  return with_tile<C>(tile_for(p, is_latent(p)), [&](auto index) -> Status {
    using L = Layout<C, decltype(index)::value>;
    const Plan plan = make_plan<L>(p, device);
    if (Status error = launch(attend<T, C, decltype(index)::value>, {s.batch * plan.splits, s.kv_heads}, L::kThreads,
                              L::kBytes, device, p, plan))
      return error;
    const int threads = static_cast<int>(divide_up(plan.width, 128) * 32);
    return launch(combine<T>, {s.total_q * s.heads}, threads, 0, device, p, plan);
  });
}

template <class T>
Status run(const AttentionParams& p, const Device& device) {
  return with_cache_type<T>(p, [&](auto c) { return run<T, decltype(c)>(p, device); });
}

}  // namespace
}  // namespace decode

bool attention_decode_serves(const AttentionParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  if (!s.block_table || p.mask.block_mask || p.q_dtype == DType::f32) return false;
  if (s.cu_q && s.total_q != s.batch) return false;
  // Positions and pages are 32-bit numbers on the device, kv_heads is a grid's y.
  if (s.block_size > INT32_MAX || s.kv_heads > 65535 || s.total_q * s.heads > INT32_MAX) return false;
  if (decode::tile_for(p, false) < 0) return false;
  return decode::tile_fits(p, device);
}

int64_t attention_decode_workspace(const AttentionParams& p, const Device& device) {
  int64_t most = 0;
  const auto measure = [&](auto c, bool latent) {
    return decode::with_tile<decltype(c)>(decode::tile_for(p, latent), [&](auto index) -> Status {
      using L = decode::Layout<decltype(c), decltype(index)::value>;
      const decode::Plan plan = decode::make_plan<L>(p, device);
      const int64_t row =
          plan.width * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(decode::RowStats));
      const int64_t bytes = p.shape.total_q * p.shape.heads * plan.splits * row;
      most = bytes > most ? bytes : most;
      return nullptr;
    });
  };
  for (bool latent : {false, true}) decode::with_cache_type<f16>(p, [&](auto c) { return measure(c, latent); });
  return most;
}

Status attention_decode(const AttentionParams& p, const Device& device) {
  if (p.q_dtype == DType::bf16) return decode::run<bf16>(p, device);
  if (p.q_dtype == DType::f16) return decode::run<f16>(p, device);
  return "decode attention takes bfloat16 or float16 queries";
}

}  // namespace cuda
}  // namespace llmcore