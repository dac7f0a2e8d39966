// Decode attention over a paged cache, on any GPU from sm_80 up: the few new rows of a sequence, times all query heads
// of a KV head, are the M tile of mma.m16n8k16, so that the cache, which bounds the speed, is read once for all of
// them. The keys of a sequence are split among CTAs; a second kernel joins the splits in their order.
// docs/cuda-decode.md tells it from above.
#include "attention_decode.cuh"

#include <type_traits>

#include "attention_common.cuh"
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

// The tile that task number `task` begins with, without its end; false if there is none. All lanes of a warp must ask
// together.
PTX_DEVICE bool first_rows(const AttentionShape& s, const Plan& plan, int tile_rows, int task, RowTile& rows) {
  if (!plan.row_tiles) return find_packed(s, plan.group, tile_rows, task, rows.b, rows.first);
  rows.b = task / plan.row_tiles;
  rows.first = task % plan.row_tiles * tile_rows;
  return true;
}

// Of a lane's two rows, `row` and eight further on: their places in plan.stats, or -1 where rows are padding; and their
// sinks.
PTX_DEVICE void places_of(const AttentionParams& p, const Plan& plan, const RowTile& rows, int row, int split,
                          int64_t (&place)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i, row += 8) {
    const int head = static_cast<int>(blockIdx.y) * plan.group + row % plan.group;
    place[i] = ((rows.query0 + row / plan.group) * p.shape.heads + head) * plan.splits + split;
    if (row >= rows.end) place[i] = -1;
  }
}
PTX_DEVICE void sinks_of(const AttentionParams& p, const Plan& plan, int row, float (&sink)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i, row += 8)
    sink[i] =
        p.mask.sinks ? p.mask.sinks[static_cast<int>(blockIdx.y) * plan.group + row % plan.group] * kLog2e : -kInfinity;
}

// Eight columns of a row of the output, as far as it has them.
template <class T>
PTX_DEVICE void write_chunk(T* to, const ptx::Vec16& x, int count, bool vectors) {
  if (vectors && count >= 8) {
    ptx::store_global_16(to, x);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) to[e] = T{static_cast<uint16_t>(x.x[e / 2] >> 16 * (e % 2))};
}

// The output of a tile of rows, from where the queries were.
template <class T, class L>
PTX_DEVICE void write_output(const AttentionParams& p, const Plan& plan, const RowTile& rows, const uint8_t* memory) {
  constexpr int kChunks = L::kTile.v_head / 8;
  const int count = rows.end - rows.first, columns = static_cast<int>(p.shape.v_head_dim);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * kChunks; i += L::kThreads) {
    const int local = i / kChunks, chunk = i % kChunks, row = rows.first + local;
    if (8 * chunk >= columns) continue;
    const int query = row / plan.group, head = static_cast<int>(blockIdx.y) * plan.group + row % plan.group;
    T* to = static_cast<T*>(p.out) + rows.b * p.out_strides.batch +
            (query + (p.shape.cu_q ? rows.query0 : 0)) * p.out_strides.row + head * p.out_strides.head;
    write_chunk(to + 8 * chunk, *reinterpret_cast<const ptx::Vec16*>(memory + L::output_at(local, 8 * chunk)),
                columns - 8 * chunk, plan.out_vectors);
  }
}

// grid: (tasks * splits, kv_heads). The tasks of a split are neighbours, so that tiles of rows of one sequence run at
// the same time and find in L2 the keys that one of them has brought.
template <class T, class C, int Index>
__global__ void __launch_bounds__(Layout<C, Index>::kThreads, Layout<C, Index>::kCtas)
    attend(AttentionParams p, Plan plan) {
  using L = Layout<C, Index>;
  constexpr Tile kTile = L::kTile;
  PTX_SHARED_MEMORY(memory);
  ptx::launch_dependents();  // combine() may come as soon as there is room for it
  const AttentionShape& s = p.shape;
  const int split = static_cast<int>(blockIdx.x) / plan.tasks, kv_head = static_cast<int>(blockIdx.y);
  const int group = plan.group;
  RowTile rows;
  if (!first_rows(s, plan, kTile.rows, static_cast<int>(blockIdx.x) % plan.tasks, rows)) return;

  Warp<T, C, Index> w;
  w.memory = memory;
  w.warp = static_cast<int>(threadIdx.x) / 32;
  w.lane = static_cast<int>(threadIdx.x) % 32;
  w.column_group = w.warp % kTile.column_groups;
  w.row_tile = w.warp / kTile.column_groups % L::kRowTiles;
  w.key_group = w.warp / kTile.column_groups / L::kRowTiles;
  const int lane_row = w.row_tile * 16 + w.lane / 4;  // and eight further on

  // One tile, unless cu_q gives a sequence more rows than the launcher thought, that is those of others.
  for (;; rows.first += plan.row_stride) {
    const int b = rows.b, num_k = s.kv_lens[b];
    rows.query0 = s.cu_q ? s.cu_q[b] : b * static_cast<int>(s.seq_q);
    const int num_q = s.cu_q ? s.cu_q[b + 1] - rows.query0 : static_cast<int>(s.seq_q);
    if (rows.first >= num_q * group) return;
    const int row0 = rows.first, row_end = clamp(num_q * group, 0, row0 + kTile.rows);
    rows.end = row_end;
    auto* kept_rows = reinterpret_cast<RowTile*>(memory + L::kRowTile0);
    if (threadIdx.x == 0) *kept_rows = rows;

    // The union of what the rows see; each split takes the same number of tiles, the last ones less or nothing.
    const int first = visible_keys(p.mask, row0 / group, num_q, num_k).first;
    const int last = visible_keys(p.mask, (row_end - 1) / group, num_q, num_k).last;
    const int all_tiles = last < first ? 0 : (last - first) / kTile.keys + 1;
    const int share = (all_tiles + plan.splits - 1) / plan.splits;
    const int tile0 = split * share;
    const int tiles = clamp(all_tiles - tile0, 0, share);
    const int key0 = first + tile0 * kTile.keys;
    if (tiles == 0 && plan.splits > 1) {  // nothing but the neutral element: the sums will not be read
      int64_t place[2];
      places_of(p, plan, rows, row0 + lane_row, split, place);
      if (w.leads())
        for (int64_t at : place)
          if (at >= 0) plan.stats[at] = {-kInfinity, 0.f};
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + lane_row + 8 * i;
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
    finder.look_up(0);  // the longest way begins here
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
      const int64_t query = row / group + (s.cu_q ? rows.query0 : 0);
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
    rows = *kept_rows;
    const int row = rows.first + w.row_tile * 16 + w.lane / 4;
    if (plan.splits > 1) {
      int64_t place[2];
      places_of(p, plan, rows, row, split, place);
      w.finish_sums(plan, place);
    } else {
      float sink[2];
      sinks_of(p, plan, row, sink);
      w.finish_output(sink);
      ptx::syncthreads();
      write_output<T, L>(p, plan, rows, memory);
    }
    ptx::syncthreads();  // and again, for another round
  }
}

// Joins the splits of one row and head: grid (total_q * heads). The warps of a CTA divide the columns, 128 each, and
// then the splits, which in each warp the lanes share among them to find the weights. Groups of warps meet in shared
// memory, in their order.
template <class T>
__global__ void combine(AttentionParams p, Plan plan) {
  PTX_SHARED_MEMORY(memory);
  const AttentionShape& s = p.shape;
  const int64_t row = blockIdx.x / s.heads, head = blockIdx.x % s.heads,
                place = blockIdx.x * static_cast<int64_t>(plan.splits);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int across = (static_cast<int>(plan.width) + 127) / 128 * 32, down = static_cast<int>(blockDim.x) / across;
  const int part = static_cast<int>(threadIdx.x) / across, column = static_cast<int>(threadIdx.x) % across * 4;
  const RowStats* stats = plan.stats + place;
  const float sink = p.mask.sinks ? p.mask.sinks[head] * kLog2e : -kInfinity;
  ptx::wait_for_grids();  // attend() has written stats and sums

  float top = -kInfinity;
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
  float total = 0.f, sum[4] = {};
  for (int first = 0; first < used; first += 32) {
    float mine = 0.f;  // the weight of split first + lane
    if (first + lane < used) {
      const RowStats x = stats[first + lane];
      mine = ptx::exp2(x.highest - base);
      total += x.total * mine;
    }
    const int count = used - first < 32 ? used - first : 32;
#pragma unroll 4
    for (int i = part; i < count; i += down) {
      const float weight = ptx::shfl(mine, i);
      if (column < plan.width) {
        const ptx::Vec16 v = ptx::load_global_16(plan.sums + (place + first + i) * plan.width + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += weight * ptx::from_bits(v.x[j]);
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += ptx::shfl_xor(total, step);
  auto* sums = reinterpret_cast<ptx::Vec16*>(memory);
  if (part > 0) sums[threadIdx.x] = {ptx::bits(sum[0]), ptx::bits(sum[1]), ptx::bits(sum[2]), ptx::bits(sum[3])};
  ptx::syncthreads();
  if (part > 0) return;
  for (int i = 1; i < down; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += ptx::from_bits(sums[i * across + threadIdx.x].x[j]);
  const int64_t b = s.cu_q ? 0 : row / s.seq_q, query = s.cu_q ? row : row % s.seq_q;
  T* out = static_cast<T*>(p.out) + b * p.out_strides.batch + query * p.out_strides.row + head * p.out_strides.head;
  const float factor = output_factor({top, total}, sink);
  const int columns = static_cast<int>(s.v_head_dim);
  for (int j = 0; j < 4; ++j)
    if (column + j < columns) out[column + j] = from_float<T>(sum[j] * factor);
}

// ---- launching -----------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a sequence: queries times the query heads that share a KV head. cu_q is on the device: where there are as
// many queries as sequences, each is taken to have one, which is what decoding does; else all tiles are made to be of
// use for a sequence with the mean number of rows. Any other division is served too.
int64_t rows_of(const AttentionShape& s) {
  return s.heads / s.kv_heads * (s.cu_q ? divide_up(s.total_q, s.batch) : s.seq_q);
}
bool one_query_each(const AttentionShape& s) { return s.cu_q ? s.total_q == s.batch : s.seq_q == 1; }

bool is_latent(const AttentionParams& p) {
  return p.k == p.v && p.k_scale == p.v_scale && p.k_strides.batch == p.v_strides.batch &&
         p.k_strides.row == p.v_strides.row && p.k_strides.head == p.v_strides.head &&
         p.shape.v_head_dim <= p.shape.head_dim;
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

// f(C()) of the type that the elements of the caches have in shared memory.
template <class T, class F>
auto with_cache_type(const AttentionParams& p, const F& f) {
  if (p.kv_dtype == DType::i8) return f(int8_t{});
  if (p.kv_dtype == DType::f8) return f(f8{});
  return f(T{});
}

// The layouts of 16-bit types are the same, so one of them will do to ask for sizes.
bool tile_fits(const AttentionParams& p, int index, const Device& device) {
  return with_cache_type<f16>(p, [&](auto c) {
    return !with_tile<decltype(c)>(index, [&](auto i) -> Status {
      return Layout<decltype(c), decltype(i)::value>::kBytes <= device.shared_bytes ? nullptr
                                                                                    : "too large for the device";
    });
  });
}

// The tile of a call, or -1: of the first head sizes in the table that hold the call's and fit the device, the first
// with room for a sequence's rows, or the one with the most. Where k and v lie is not known before the call itself, so
// `latent` is asked apart.
int tile_for(const AttentionParams& p, bool latent, const Device& device) {
  int chosen = -1;
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& t = kTiles[i];
    if (p.shape.head_dim > t.head || p.shape.v_head_dim > t.v_head || (t.latent && !latent)) continue;
    if (!tile_fits(p, i, device)) continue;
    if (chosen >= 0 && (t.head != kTiles[chosen].head || t.latent != kTiles[chosen].latent)) break;
    chosen = i;
    if (rows_of(p.shape) <= t.rows) break;
  }
  return chosen;
}

// Whether the prefill kernel would do better. For one tile of rows it would not: half of its own would be empty. It
// forms the scores anew for every 256 columns of v. Else its tiles of 128 rows read each key half as often and its
// warps of 32 rows each fragment, so it is better off unless it leaves half of the device idle, not dividing the keys.
bool prefill_is_better(const AttentionShape& s, const Device& device) {
  constexpr int kDecodeRows = 64, kPrefillRows = 128, kPrefillColumns = 256;
  if (rows_of(s) <= kDecodeRows || s.v_head_dim > kPrefillColumns) return false;
  return 2 * s.batch * s.kv_heads * divide_up(rows_of(s), kPrefillRows) > device.multiprocessors;
}

// ---- the division of the keys

// As seen from the host, which does not know kv_lens: what the table has room for.
struct Work {
  int64_t tasks;          // tiles of rows of all sequences and KV heads
  int64_t tiles;          // of keys that each of them sees
  int64_t tile_bytes;     // of the caches
  int64_t partial_bytes;  // of a tile of rows
  int64_t slots;          // for CTAs on the device
};

// The number of splits that costs least, where the cost is what the CTAs of a slot read and write, one after the other:
// their tiles, and, if there are splits, their partial sums. Tried are those that fill up the slots once, twice and so
// on, for a last round of CTAs that leaves slots empty takes as long as a full one.
int choose_splits(const Work& w) {
  constexpr int64_t kMostRounds = 4, kBeginning = 64 << 10;  // a CTA's latency before its first tile, as bytes
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t i = 1; i <= kMostRounds; ++i) {
    int64_t splits = i * w.slots / w.tasks;
    splits = splits < 1 ? 1 : splits > w.tiles ? w.tiles : splits;
    const int64_t share = divide_up(w.tiles, splits);
    splits = divide_up(w.tiles, share);
    const int64_t rounds = divide_up(w.tasks * splits, w.slots);
    const int64_t cost = rounds * (share * w.tile_bytes + kBeginning + (splits > 1 ? w.partial_bytes : 0));
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return static_cast<int>(best);
}

// Keys that a tile of rows can see at most.
int64_t most_keys(const AttentionParams& p) {
  const int64_t keys = p.shape.table_stride * p.shape.block_size, window = p.mask.window;
  const int64_t queries = p.shape.cu_q ? p.shape.total_q : p.shape.seq_q;
  const bool narrow = window && window < keys && 2 * window + queries < keys;
  const int64_t most = narrow ? 2 * window + queries : keys;
  return most > 1 ? most : 1;
}

bool rows_aligned(const void* p, const RowStrides& s, int64_t element) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && s.batch * element % 16 == 0 && s.row * element % 16 == 0 &&
         s.head * element % 16 == 0;
}

template <class L>
Plan make_plan(const AttentionParams& p, const Device& device) {
  constexpr int kRows = L::kTile.rows;
  const AttentionShape& s = p.shape;
  const int64_t row_tiles = divide_up(rows_of(s), kRows);
  const bool search = s.cu_q && !one_query_each(s);
  Plan plan{};
  plan.group = static_cast<int>(s.heads / s.kv_heads);
  plan.row_tiles = search ? 0 : static_cast<int>(row_tiles);
  plan.row_stride = search ? kNoEnd : static_cast<int>(row_tiles * kRows);
  // Every sequence may have one tile that is not full.
  plan.tasks = static_cast<int>(search ? s.total_q * plan.group / kRows + s.batch : s.batch * row_tiles);
  plan.width = divide_up(s.v_head_dim, 16) * 16;
  const int64_t element = has_scales(p.kv_dtype) ? 1 : 2, columns = s.head_dim + (L::kTile.latent ? 0 : s.v_head_dim);
  const int64_t rows = rows_of(s) < kRows ? rows_of(s) : kRows;
  plan.splits = choose_splits({s.batch * row_tiles * s.kv_heads, divide_up(most_keys(p), L::kTile.keys),
                               L::kTile.keys * columns * element, rows * plan.width * 4,
                               int64_t{L::ctas(device.shared_bytes)} * device.multiprocessors});
  plan.q_vectors = rows_aligned(p.q, p.q_strides, 2);
  const bool as_they_are = p.kv_dtype == p.q_dtype || has_scales(p.kv_dtype);
  plan.k_vectors = as_they_are && rows_aligned(p.k, p.k_strides, element);
  plan.v_vectors = as_they_are && rows_aligned(p.v, p.v_strides, element);
  plan.out_vectors = rows_aligned(p.out, p.out_strides, 2);
  const int64_t partials = s.total_q * s.heads * plan.splits;
  plan.sums = static_cast<float*>(p.workspace);
  plan.stats = reinterpret_cast<RowStats*>(plan.sums + partials * plan.width);
  return plan;
}

// As many warps for a row's columns as it takes, times what shares the splits: four loads in flight do for each.
template <class T>
Status join(const AttentionParams& p, const Plan& plan, const Device& device) {
  constexpr int64_t kMostWarps = 8;
  const int64_t across = divide_up(plan.width, 128), down = divide_up(plan.splits, 4);
  const int64_t most = kMostWarps / across > 1 ? kMostWarps / across : 1;
  const int threads = static_cast<int>(32 * across * (down < most ? down : most));
  return launch_dependent(combine<T>, {p.shape.total_q * p.shape.heads}, threads,
                          threads * static_cast<int>(sizeof(ptx::Vec16)), device, p, plan);
}

template <class T, class C>
Status run(const AttentionParams& p, const Device& device) {
  return with_tile<C>(tile_for(p, is_latent(p), device), [&](auto index) -> Status {
    using L = Layout<C, decltype(index)::value>;
    const Plan plan = make_plan<L>(p, device);
    if (Status error =
            launch(attend<T, C, decltype(index)::value>, {int64_t{plan.tasks} * plan.splits, p.shape.kv_heads},
                   L::kThreads, L::kBytes, device, p, plan))
      return error;
    return plan.splits > 1 ? join<T>(p, plan, device) : nullptr;
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
  if (!s.block_table || p.mask.block_mask || p.lse || p.q_dtype == DType::f32 || s.total_q == 0) return false;
  // Rows, positions and pages are 32-bit numbers on the device, kv_heads is a grid's y.
  if (s.block_size > INT32_MAX || s.kv_heads > 65535 || s.total_q * s.heads >= kNoEnd) return false;
  return !decode::prefill_is_better(s, device) && decode::tile_for(p, decode::is_latent(p), device) >= 0;
}

int64_t attention_decode_workspace(const AttentionParams& p, const Device& device) {
  int64_t most = 0;
  const auto measure = [&](auto c, bool latent) {
    return decode::with_tile<decltype(c)>(decode::tile_for(p, latent, device), [&](auto index) -> Status {
      using L = decode::Layout<decltype(c), decltype(index)::value>;
      const decode::Plan plan = decode::make_plan<L>(p, device);
      const int64_t row =
          plan.width * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(decode::RowStats));
      const int64_t bytes = plan.splits > 1 ? p.shape.total_q * p.shape.heads * plan.splits * row : 0;
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