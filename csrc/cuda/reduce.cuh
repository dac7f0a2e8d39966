// Teams of threads that share a row, and sums over them. Every sum is taken in a fixed order: the same on every run.
#pragma once
#include "vec.cuh"

namespace llmcore {
namespace cuda {

// Over groups of Lanes (a power of two) neighbouring lanes; every lane of the warp must call, and gets its group's.
template <int Lanes>
PTX_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) x += ptx::shfl_xor(x, mask);
  return x;
}
template <int Lanes>
PTX_DEVICE float lanes_max(float x) {  // of the numbers: a NaN is passed over
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, ptx::shfl_xor(x, mask));
  return x;
}

// A team is Size (a power of two) neighbouring threads of a CTA. Its thread i takes the chunks i, i + Size, ... of the
// row, each of Width elements. The first Held elements that a thread takes can stay in registers; `rest` is for rows
// longer than kColumns. The row's length is a multiple of Width; teams without a row pass 0.
template <int Size, int Width, int Held>
struct Team {
  static_assert(Held % Width == 0);
  static constexpr int kChunks = Held / Width, kColumns = Size * Held;

  // f(chunk, column), chunk a constant in [0, kChunks) after unrolling
  template <class F>
  PTX_DEVICE void held(int64_t dim, const F& f) {
    const int64_t first = threadIdx.x % Size * Width;  // 64 bits throughout: chunks become offsets in the instructions
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      if (const int64_t column = first + int64_t{chunk * Size * Width}; column < dim) f(chunk, column);
  }

  // f(column)
  template <class F>
  PTX_DEVICE void rest(int64_t dim, const F& f) {
#pragma unroll 1  // rare: not worth the registers
    for (int64_t column = kColumns + threadIdx.x % Size * Width; column < dim; column += Size * Width) f(column);
  }
};

// What the teams of Size threads in a CTA of Threads join their values by. Teams of more than a warp meet at a barrier
// of their own.
struct Sum {
  template <int Lanes>
  PTX_DEVICE float over_lanes(float x) {
    return lanes_sum<Lanes>(x);
  }
};
struct Max {
  template <int Lanes>
  PTX_DEVICE float over_lanes(float x) {
    return lanes_max<Lanes>(x);
  }
};

template <class Join, int Threads, int Size, int Values>
class TeamReduction {
 public:
  static constexpr int kWarps = Threads / 32;
  static constexpr int kBytes = Size <= 32 ? 0 : 2 * Values * kWarps * static_cast<int>(sizeof(float));

  __device__ explicit TeamReduction(uint8_t* shared) : joined_(reinterpret_cast<float*>(shared)) {}

  // Each x[v] becomes its sum (maximum) over the team.
  __device__ void operator()(float (&x)[Values]) {
#pragma unroll
    for (int v = 0; v < Values; ++v) x[v] = Join::template over_lanes<(Size < 32 ? Size : 32)>(x[v]);
    if constexpr (Size > 32) {
      constexpr int kTeamWarps = Size / 32;
      const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, team = thread / Size;
      // Two buffers in turn: who writes one again has passed the barrier that its last readers reached afterwards.
      float* joined = joined_ + turn_ * Values * kWarps;
      turn_ ^= 1;
      if (thread % 32 == 0)
#pragma unroll
        for (int v = 0; v < Values; ++v) joined[v * kWarps + warp] = x[v];
      if constexpr (Size == Threads)
        ptx::syncthreads();
      else
        ptx::barrier_sync(1 + team, Size);
#pragma unroll
      for (int v = 0; v < Values; ++v)
        x[v] = Join::template over_lanes<kTeamWarps>(joined[v * kWarps + team * kTeamWarps + thread % kTeamWarps]);
    }
  }

 private:
  float* joined_;
  int turn_ = 0;
};
template <int Threads, int Size, int Values>
using TeamSum = TeamReduction<Sum, Threads, Size, Values>;
template <int Threads, int Size, int Values>
using TeamMax = TeamReduction<Max, Threads, Size, Values>;

// Sums of columns over the teams of a CTA, each of which holds `mine` for the columns that Team::held gives it.
template <int Threads, int Size, int Width, int Held>
struct ColumnSums {
  using Mine = Team<Size, Width, Held>;
  // One unused float after every 32: the threads of a warp, Width columns apart, write to different banks.
  static constexpr int kStride = Mine::kColumns + Mine::kColumns / 32, kTeams = Threads / Size;
  static constexpr int kBytes = kTeams * kStride * static_cast<int>(sizeof(float));

  PTX_DEVICE int place(int column) { return column + column / 32; }

  // out[column] for the first min(columns, kColumns) columns. All threads call it.
  PTX_DEVICE void write(const float (&mine)[Held / Width][Width], uint8_t* shared, float* out, int64_t columns) {
    float* sums = reinterpret_cast<float*>(shared);
    const int thread = static_cast<int>(threadIdx.x),
              end = static_cast<int>(columns < Mine::kColumns ? columns : Mine::kColumns);
    ptx::syncthreads();  // the last call has been read
    Mine::held(end, [&](int chunk, int64_t column) {
#pragma unroll
      for (int i = 0; i < Width; ++i)
        sums[thread / Size * kStride + place(static_cast<int>(column) + i)] = mine[chunk][i];
    });
    ptx::syncthreads();
    for (int column = thread; column < end; column += Threads) {
      float sum = 0.f;
#pragma unroll
      for (int team = 0; team < kTeams; ++team) sum += sums[team * kStride + place(column)];
      out[column] = sum;
    }
  }
};

// The sum over a CTA of Threads (a power of two), in thread 0; others get 0. `shared` holds Threads doubles.
template <int Threads>
PTX_DEVICE double block_sum(double x, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  ptx::syncthreads();  // the last call has been read
  shared[thread] = x;
#pragma unroll
  for (int half = Threads / 2; half > 0; half /= 2) {
    ptx::syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  return thread == 0 ? shared[0] : 0.;  // for the others it may not be there yet
}

}  // namespace cuda
}  // namespace llmcore
