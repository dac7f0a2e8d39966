// Grouped GEMM for mixtures of experts on tensor cores by mma.sync (sm_80 and later); docs/cuda-grouped-gemm.md draws
// the data flow.
//
// How many rows each expert has is known to the device only. So grids are bounded from the shapes, each CTA finds its
// tile in the offsets (find_tile), and those behind the last tile end at once. The rows of x are gathered, and the
// gated linear unit is applied, on the way: neither sorted rows nor pre-activations need to go through memory.
#include "activations.cuh"
#include "grouped_gemm_tile.cuh"
#include "llmcore/grouped_gemm.h"

namespace llmcore {
namespace cuda {
namespace {

struct Aligned {       // what can be moved 16 bytes at a time
  bool x, other, out;  // other: the weight, or dy
};

// The chunks that a thread stages of one expert's weights, for a tile of columns of the product. For a gated linear
// unit, blocks of eight columns of the gate and of the up projection alternate, so that one thread's sums hold both of
// a pair.
template <class T, int kThreads, bool kTransposed, bool kGlu>
struct WeightColumns {
  static_assert(!kTransposed || !kGlu);
  const T* from;   // the thread's first chunk
  int64_t stride;  // from one column to the next; transposed: from one element of the sum to the next
  int left;        // columns, from the thread's first on

  // For the tile whose first column is `first`, of a result with `columns`.
  PTX_DEVICE WeightColumns of(const GroupedGemmParams& p, int expert, int first, int columns) {
    const T* base = static_cast<const T*>(p.weight) + expert * p.expert_stride;
    if constexpr (kTransposed) {
      const int column = first + thread_column();
      return {base + thread_row() * p.k_stride + column, p.k_stride, columns - column};
    } else {
      const int row = thread_row(), column = first + (kGlu ? row / 16 * 8 + row % 8 : row);
      const int source = kGlu && row / 8 % 2 ? columns + column : column;
      return {base + source * p.n_stride + thread_column(), p.n_stride, columns - column};
    }
  }
  // The chunk of the tile whose sum begins at k_begin.
  __device__ __forceinline__ Chunk<T> chunk(int pass, int panel, int k_begin, int k_end) const {
    if constexpr (kTransposed) {  // rows of the tile go along the sum
      const int at = k_begin + pass * kRowsAtOnce<kThreads>;
      return chunk_of(from + at * stride + 64 * panel, left - 64 * panel, at + thread_row() < k_end);
    } else {
      const int column = pass * kRowsAtOnce<kThreads> / (kGlu ? 2 : 1);  // of the result
      return chunk_of(from + column * stride + k_begin, k_end - k_begin - thread_column(), column < left);
    }
  }
};

PTX_DEVICE float activated(Activation activation, float gate) {
  return activation == Activation::silu ? Silu::value(gate) : GeluTanh::value(gate);
}

// Writes the part of the result that the tile holds in shared memory, in planes of kRows x kColumns: the product; for a
// gated linear unit its result, the gate and the up projection.
template <class T, int kRows, int kColumns, int kThreads, bool kGlu>
PTX_DEVICE void store_planes(const uint8_t* shared, const GroupedGluParams& g, const ExpertTile& t, int first_column,
                             bool vectors) {
  constexpr int kPlane = 2 * kRows * kColumns;
  const int64_t n = g.product.n, columns = kGlu ? n / 2 : n;
  const int left = static_cast<int>(columns) - first_column;
  T* y = static_cast<T*>(g.product.y) + t.first_row * n + first_column;
  if constexpr (kGlu) {
    store_tile<T, kRows, kColumns, kThreads>(shared, static_cast<T*>(g.out) + t.first_row * columns + first_column,
                                             columns, t.rows, left, vectors);
    if (!g.product.y) return;
    store_tile<T, kRows, kColumns, kThreads>(shared + kPlane, y, n, t.rows, left, vectors);
    store_tile<T, kRows, kColumns, kThreads>(shared + 2 * kPlane, y + columns, n, t.rows, left, vectors);
  } else {
    store_tile<T, kRows, kColumns, kThreads>(shared, y, n, t.rows, left, vectors);
  }
}

// ---- many rows: the rows are the side of m -------------------------------------------------------------------------

template <class T, int kIndex, bool kTransposed, bool kGlu>
__global__ void __launch_bounds__(kGemmTiles[kIndex].threads(), kGemmTiles[kIndex].ctas)
    multiply(GroupedGluParams g, Aligned aligned) {
  constexpr GemmTile kTile = kGemmTiles[kIndex];
  constexpr int kThreads = kTile.threads(), kColumns = kGlu ? kTile.n / 2 : kTile.n;
  const GroupedGemmParams& p = g.product;
  const int columns = static_cast<int>(kGlu ? p.n / 2 : p.n), k = static_cast<int>(p.k);
  ExpertTile t;
  if (!find_tile(p.offsets, static_cast<int>(p.num_experts), kTile.m, ceil_div(columns, kColumns), blockIdx.x, t))
    return;

  PTX_SHARED_MEMORY(shared);
  SourceRows<T, kTile.m, kThreads> rows;
  rows.find(p.x, p.x_stride, p.token_of, t.first_row, t.rows);
  const auto weight =
      WeightColumns<T, kThreads, kTransposed, kGlu>::of(p, t.expert, t.column_block * kColumns, columns);
  const auto stage = [&](int step, uint32_t slot) {
    const int k_begin = step * kStep;
    stage_tile<T, kTile.m, kStep, kThreads>(shared, slot, aligned.x,
                                            [&](int pass, int) { return rows.chunk(pass, k_begin, k); });
    stage_tile<T, kTransposed ? kStep : kTile.n, kTransposed ? kTile.n : kStep, kThreads>(
        shared, slot + kTile.a_bytes(), aligned.other,
        [&](int pass, int panel) { return weight.chunk(pass, panel, k_begin, k); });
  };
  Sums<kIndex> sums = {};
  multiply_steps<T, kIndex, false, kTransposed>(shared, ceil_div(k, kStep), warp_row<kIndex>() >= t.rows, stage, sums);

  constexpr int kPlane = 2 * kTile.m * kColumns;
  const int lane = threadIdx.x % 32, first_column = warp_column<kIndex>() / (kGlu ? 2 : 1);
#pragma unroll
  for (int f = 0; f < kTile.warp_m() / 16; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row<kIndex>() + 16 * f + 8 * half + lane / 4;
#pragma unroll
      for (int j = 0; j < kTile.warp_n() / (kGlu ? 16 : 8); ++j) {
        const auto put = [&](int plane, float low, float high) {
          *reinterpret_cast<uint32_t*>(shared + plane * kPlane + chunk_offset(2 * kColumns, row, first_column / 8 + j) +
                                       lane % 4 * 4) = pack2(T{}, low, high);
        };
        if constexpr (kGlu) {
          const float(&gate)[4] = sums[f][2 * j], (&up)[4] = sums[f][2 * j + 1];
          put(0, activated(g.activation, gate[2 * half]) * up[2 * half],
              activated(g.activation, gate[2 * half + 1]) * up[2 * half + 1]);
          if (p.y) {
            put(1, gate[2 * half], gate[2 * half + 1]);
            put(2, up[2 * half], up[2 * half + 1]);
          }
        } else {
          put(0, sums[f][j][2 * half], sums[f][j][2 * half + 1]);
        }
      }
    }
  ptx::syncthreads();
  store_planes<T, kTile.m, kColumns, kThreads, kGlu>(shared, g, t, t.column_block * kColumns, aligned.out);
}

// ---- few rows: the weights are the side of m -----------------------------------------------------------------------

// The grid's y divides the sum; with more than one part, float sums go to the workspace, (parts, rows, n), and
// join_parts() adds them in their order.
template <class T, bool kTransposed, bool kGlu>
__global__ void __launch_bounds__(kGemmTiles[kFew].threads(), kGemmTiles[kFew].ctas)
    multiply_few(GroupedGluParams g, Aligned aligned, int part_steps) {
  constexpr GemmTile kTile = kGemmTiles[kFew];
  constexpr int kThreads = kTile.threads(), kColumns = kGlu ? kTile.m / 2 : kTile.m;
  const GroupedGemmParams& p = g.product;
  const int columns = static_cast<int>(kGlu ? p.n / 2 : p.n), k = static_cast<int>(p.k);
  ExpertTile t;
  if (!find_tile(p.offsets, static_cast<int>(p.num_experts), kTile.n, ceil_div(columns, kColumns), blockIdx.x, t))
    return;

  PTX_SHARED_MEMORY(shared);
  SourceRows<T, kTile.n, kThreads> rows;
  rows.find(p.x, p.x_stride, p.token_of, t.first_row, t.rows);
  const auto weight =
      WeightColumns<T, kThreads, kTransposed, kGlu>::of(p, t.expert, t.column_block * kColumns, columns);
  const int first_step = static_cast<int>(blockIdx.y) * part_steps;
  const auto stage = [&](int step, uint32_t slot) {
    const int k_begin = (first_step + step) * kStep;
    stage_tile<T, kTransposed ? kStep : kTile.m, kTransposed ? kTile.m : kStep, kThreads>(
        shared, slot, aligned.other, [&](int pass, int panel) { return weight.chunk(pass, panel, k_begin, k); });
    stage_tile<T, kTile.n, kStep, kThreads>(shared, slot + kTile.a_bytes(), aligned.x,
                                            [&](int pass, int) { return rows.chunk(pass, k_begin, k); });
  };
  const int steps = smaller(ceil_div(k, kStep) - first_step, part_steps);
  Sums<kFew> sums = {};
  multiply_steps<T, kFew, kTransposed, false>(shared, steps, false, stage, sums);

  // Every sum of the thread: f(row of the tile, column of the result, whether it is the up projection's, sums).
  const int lane = threadIdx.x % 32, first_column = t.column_block * kColumns;
  const auto each_sum = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kTile.warp_m() / 16; ++i)
#pragma unroll
      for (int j = 0; j < kTile.warp_n() / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * j + lane % 4 * 2 + e, column = (warp_row<kFew>() + 16 * i) / (kGlu ? 2 : 1) + lane / 4;
          f(row, column, sums[i][j][e], sums[i][j][2 + e]);
        }
  };
  if (gridDim.y > 1) {
    float* to = static_cast<float*>(p.workspace) + (blockIdx.y * p.rows + t.first_row) * p.n;
    each_sum([&](int row, int column, float sum, float other) {
      const int at = first_column + column, second = kGlu ? at + columns : at + 8;
      if (row >= t.rows) return;
      if (at < columns) to[row * p.n + at] = sum;
      if (kGlu ? at < columns : second < columns) to[row * p.n + second] = other;
    });
    return;
  }
  constexpr int kPlane = 2 * kTile.n * kColumns;
  const auto put = [&](int plane, int row, int column, float x) {
    *reinterpret_cast<T*>(shared + plane * kPlane + chunk_offset(2 * kColumns, row, column / 8) + column % 8 * 2) =
        from_float<T>(x);
  };
  each_sum([&](int row, int column, float sum, float other) {
    if constexpr (kGlu) {
      put(0, row, column, activated(g.activation, sum) * other);
      if (!p.y) return;
      put(1, row, column, sum);
      put(2, row, column, other);
    } else {
      put(0, row, column, sum);
      put(0, row, column + 8, other);
    }
  });
  ptx::syncthreads();
  store_planes<T, kTile.n, kColumns, kThreads, kGlu>(shared, g, t, first_column, aligned.out);
}

constexpr int kJoinThreads = 256;

template <class T, bool kGlu>
__global__ void __launch_bounds__(kJoinThreads) join_parts(GroupedGluParams g, int parts) {
  const GroupedGemmParams& p = g.product;
  const int64_t columns = kGlu ? p.n / 2 : p.n;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (at >= p.rows * columns) return;
  const int64_t row = at / columns, column = at % columns;
  const float* from = static_cast<const float*>(p.workspace) + row * p.n + column;
  float sum = 0.f, up = 0.f;
  for (int part = 0; part < parts; ++part) {
    sum += from[part * p.rows * p.n];
    if constexpr (kGlu) up += from[part * p.rows * p.n + columns];
  }
  T* y = static_cast<T*>(p.y) + row * p.n + column;
  if constexpr (kGlu) {
    static_cast<T*>(g.out)[at] = from_float<T>(activated(g.activation, sum) * up);
    if (!p.y) return;
    y[columns] = from_float<T>(up);
  }
  *y = from_float<T>(sum);
}

// ---- the gradient of the weights -----------------------------------------------------------------------------------

// A CTA sums a tile of one expert's gradient over all its rows, in their order; without rows it writes zeros.
template <class T, int kIndex>
__global__ void __launch_bounds__(kGemmTiles[kIndex].threads(), kGemmTiles[kIndex].ctas)
    weight_grad(GroupedGemmWeightGradParams p, Aligned aligned) {
  constexpr GemmTile kTile = kGemmTiles[kIndex];
  constexpr int kThreads = kTile.threads();
  const int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  const uint32_t n_blocks = static_cast<uint32_t>(ceil_div(n, kTile.m)), k_blocks = ceil_div(k, kTile.n);
  const int expert = static_cast<int>(blockIdx.x / (n_blocks * k_blocks));
  const int n_begin = static_cast<int>(blockIdx.x % n_blocks) * kTile.m;
  const int k_begin = static_cast<int>(blockIdx.x / n_blocks % k_blocks) * kTile.n;
  const int begin = p.offsets[expert], num_rows = p.offsets[expert + 1] - begin;

  PTX_SHARED_MEMORY(shared);
  constexpr int kPasses = kStep / kRowsAtOnce<kThreads>;
  int source[kPasses] = {};  // the rows of x that the thread stages next: looked up a step ahead
  const auto row_of = [&](int step, int pass) { return step * kStep + pass * kRowsAtOnce<kThreads> + thread_row(); };
  const auto look_up = [&](int step) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      if (const int row = row_of(step, pass); row < num_rows)
        source[pass] = p.token_of ? p.token_of[begin + row] : begin + row;
  };
  look_up(0);
  const auto stage = [&](int step, uint32_t slot) {
    stage_tile<T, kStep, kTile.m, kThreads>(shared, slot, aligned.other, [&](int pass, int panel) {
      const int row = row_of(step, pass), column = n_begin + 64 * panel + thread_column();
      return chunk_of(static_cast<const T*>(p.dy) + (begin + row) * p.dy_stride + column, n - column, row < num_rows);
    });
    stage_tile<T, kStep, kTile.n, kThreads>(shared, slot + kTile.a_bytes(), aligned.x, [&](int pass, int panel) {
      const int column = k_begin + 64 * panel + thread_column();
      return chunk_of(static_cast<const T*>(p.x) + source[pass] * p.x_stride + column, k - column,
                      row_of(step, pass) < num_rows);
    });
    look_up(step + 1);
  };
  Sums<kIndex> sums = {};
  multiply_steps<T, kIndex, true, true>(shared, ceil_div(num_rows, kStep), n_begin + warp_row<kIndex>() >= n, stage,
                                        sums);

  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int f = 0; f < kTile.warp_m() / 16; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kTile.warp_n() / 8; ++j) {
        const int row = warp_row<kIndex>() + 16 * f + 8 * half + lane / 4, chunk = warp_column<kIndex>() / 8 + j;
        *reinterpret_cast<uint32_t*>(shared + chunk_offset(2 * kTile.n, row, chunk) + lane % 4 * 4) =
            pack2(T{}, sums[f][j][2 * half], sums[f][j][2 * half + 1]);
      }
  ptx::syncthreads();
  T* out = static_cast<T*>(p.dweight) + (static_cast<int64_t>(expert) * n + n_begin) * k + k_begin;
  store_tile<T, kTile.m, kTile.n, kThreads>(shared, out, k, n - n_begin, k - k_begin, aligned.out);
}

// ---- launching -----------------------------------------------------------------------------------------------------

// Rows of 16-bit elements, `stride` apart.
bool rows_fit(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
}

// How a call is done: by shapes alone, since nobody knows how the rows are distributed.
struct Plan {
  GemmTileIndex tile;
  int64_t tiles;
  int parts, part_steps;  // of the sum
};

constexpr int kFewRows = 16;      // for each expert on average, of the tile that is made for few rows
constexpr int kMinPartSteps = 4;  // of a part: enough to fill the ring

Plan plan_of(const GroupedGemmParams& p, bool glu, const Device& device) {
  const int64_t columns = glu ? p.n / 2 : p.n, sides = glu ? 2 : 1;
  const int steps = static_cast<int>(ceil_div<int64_t>(p.k, kStep));
  if (p.rows <= kFewRows * p.num_experts) {
    constexpr GemmTile kTile = kGemmTiles[kFew];
    const int64_t tiles = tile_bound(p.rows, p.num_experts, kTile.n, ceil_div<int64_t>(columns, kTile.m / sides));
    // As many parts as give every multiprocessor its CTAs.
    const int64_t wanted = ceil_div<int64_t>(int64_t{kTile.ctas} * device.multiprocessors, larger<int64_t>(tiles, 1));
    const int most = larger(steps / kMinPartSteps, 1);
    const int part_steps = ceil_div(steps, static_cast<int>(smaller<int64_t>(wanted, most)));
    return {kFew, tiles, larger(ceil_div(steps, larger(part_steps, 1)), 1), part_steps};
  }
  const auto tiles = [&](GemmTileIndex i) {
    return tile_bound(p.rows, p.num_experts, kGemmTiles[i].m, ceil_div<int64_t>(columns, kGemmTiles[i].n / sides));
  };
  const bool wide = p.n > kGemmTiles[kNarrow].n && kGemmTiles[kWide].shared_bytes() <= device.shared_bytes &&
                    tiles(kWide) >= device.multiprocessors;
  const GemmTileIndex tile = wide ? kWide : kNarrow;
  return {tile, tiles(tile), 1, steps};
}

int64_t workspace_of(const GroupedGemmParams& p, bool glu, const Device& device) {
  const int parts = plan_of(p, glu, device).parts;
  return parts > 1 ? parts * p.rows * p.n * static_cast<int64_t>(sizeof(float)) : 0;
}

template <class T, bool kTransposed, bool kGlu>
Status run(const GroupedGluParams& g, const Device& device) {
  const GroupedGemmParams& p = g.product;
  if (p.rows >= INT32_MAX || p.n >= INT32_MAX / 2 || p.k >= INT32_MAX / 2 || p.num_experts >= INT32_MAX / 2)
    return "grouped_gemm: dimensions of 2^30 or more have no CUDA kernel";
  const Plan plan = plan_of(p, kGlu, device);
  if (plan.tiles > INT32_MAX) return "grouped_gemm: more tiles than a grid may have";
  const int64_t columns = kGlu ? p.n / 2 : p.n;
  const Aligned aligned{rows_fit(p.x, p.x_stride),
                        rows_fit(p.weight, kTransposed ? p.k_stride : p.n_stride) && p.expert_stride % 8 == 0,
                        rows_fit(p.y, p.n) && rows_fit(g.out, columns) && columns % 8 == 0};
  const auto start = [&](auto kernel, GemmTileIndex i) {
    return launch(kernel, {plan.tiles}, kGemmTiles[i].threads(), kGemmTiles[i].shared_bytes(), device, g, aligned);
  };
  if (plan.tile == kWide) return start(multiply<T, kWide, kTransposed, kGlu>, kWide);
  if (plan.tile == kNarrow) return start(multiply<T, kNarrow, kTransposed, kGlu>, kNarrow);
  constexpr GemmTile kTile = kGemmTiles[kFew];
  Status status = launch(multiply_few<T, kTransposed, kGlu>, {plan.tiles, plan.parts}, kTile.threads(),
                         kTile.shared_bytes(), device, g, aligned, plan.part_steps);
  if (status || plan.parts == 1) return status;
  return launch(join_parts<T, kGlu>, {ceil_div<int64_t>(p.rows * columns, kJoinThreads)}, kJoinThreads, 0, device, g,
                plan.parts);
}

template <class T>
Status run(const GroupedGemmWeightGradParams& p, const Device& device) {
  const auto with = [&](auto kernel, GemmTileIndex i) -> Status {
    const GemmTile tile = kGemmTiles[i];
    const int64_t tiles = p.num_experts * ceil_div<int64_t>(p.n, tile.m) * ceil_div<int64_t>(p.k, tile.n);
    if (tiles > INT32_MAX || p.n >= INT32_MAX / 2 || p.k >= INT32_MAX / 2)
      return "grouped_gemm: more tiles than a grid may have";
    const Aligned aligned{rows_fit(p.x, p.x_stride), rows_fit(p.dy, p.dy_stride), rows_fit(p.dweight, p.k)};
    return launch(kernel, {tiles}, tile.threads(), tile.shared_bytes(), device, p, aligned);
  };
  const bool wide = p.k > kGemmTiles[kNarrow].n && kGemmTiles[kWide].shared_bytes() <= device.shared_bytes;
  return wide ? with(weight_grad<T, kWide>, kWide) : with(weight_grad<T, kNarrow>, kNarrow);
}

constexpr const char* kNoFloats = "grouped_gemm: float32 has no CUDA kernel";

}  // namespace

int64_t grouped_gemm_workspace(const GroupedGemmParams& p, const Device& device) {
  return workspace_of(p, false, device);
}
int64_t grouped_glu_workspace(const GroupedGluParams& g, const Device& device) {
  return workspace_of(g.product, true, device);
}

Status grouped_gemm(const GroupedGemmParams& p, const Device& device) {
  const GroupedGluParams g{p, Activation::silu, nullptr, nullptr};
  const bool transposed = p.k_stride != 1;
  switch (p.dtype) {
    case DType::bf16: return transposed ? run<bf16, true, false>(g, device) : run<bf16, false, false>(g, device);
    case DType::f16: return transposed ? run<f16, true, false>(g, device) : run<f16, false, false>(g, device);
    default: return kNoFloats;
  }
}

Status grouped_glu(const GroupedGluParams& p, const Device& device) {
  GroupedGluParams g = p;
  g.product.workspace = p.workspace;
  switch (g.product.dtype) {
    case DType::bf16: return run<bf16, false, true>(g, device);
    case DType::f16: return run<f16, false, true>(g, device);
    default: return kNoFloats;
  }
}

Status grouped_gemm_weight_grad(const GroupedGemmWeightGradParams& p, const Device& device) {
  switch (p.dtype) {
    case DType::bf16: return run<bf16>(p, device);
    case DType::f16: return run<f16>(p, device);
    default: return kNoFloats;
  }
}

}  // namespace cuda
}  // namespace llmcore
