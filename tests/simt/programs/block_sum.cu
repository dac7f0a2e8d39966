// Row sums as the norms do them: shuffles within a warp, one partial sum per warp in shared memory, a barrier.
#include "memory.h"

namespace programs {
namespace {

namespace ptx = llmcore::ptx;

enum class Bug {
  none,
  no_barrier,
  no_barrier_before_reuse,
  barrier_skipped_by_a_warp,
  barrier_counts_differ,
  arrivals_left,
  shuffle_under_divergence,
  different_shuffles,
  shuffle_with_ended_lanes,
  plain_add_across_ctas,
  no_wait_for_grids,
  plain_add_beside_red_add,
};

constexpr int kThreads = 128, kWarps = kThreads / 32, kCtas = 2, kRows = 5, kDim = 300;

struct SumParams {
  const float* x;  // (rows, dim)
  float* sums;     // (rows, warps): the row's sum as each warp found it
  float* total;    // (1), zeroed: of all rows
};

template <Bug kBug>
__global__ void __launch_bounds__(kThreads) block_sum(SumParams p) {
  PTX_SHARED_MEMORY(memory);
  float* partial = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int row = blockIdx.x; row < kRows; row += gridDim.x) {
    float sum = 0;
    for (int i = threadIdx.x; i < kDim; i += kThreads) sum += p.x[row * kDim + i];
    if (kBug == Bug::shuffle_with_ended_lanes && lane >= 16) return;
    if (kBug == Bug::shuffle_under_divergence && lane < 16) sum = ptx::shfl_xor(sum, 1);
    if (kBug == Bug::different_shuffles) sum = lane < 16 ? ptx::shfl_xor(sum, 1) : ptx::shfl(sum, lane ^ 1);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shfl_xor(sum, mask);
    if (lane == 0) partial[warp] = sum;
    if (kBug == Bug::barrier_counts_differ)
      ptx::barrier_sync(1, warp == 0 ? kThreads : kThreads - 32);
    else if (kBug != Bug::no_barrier && (kBug != Bug::barrier_skipped_by_a_warp || warp != 2))
      ptx::syncthreads();
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w];
    if (lane == 0) p.sums[row * kWarps + warp] = sum;
    if (threadIdx.x == 0) {
      if (kBug == Bug::plain_add_across_ctas || (kBug == Bug::plain_add_beside_red_add && blockIdx.x == 0))
        *p.total += sum;
      else
        ptx::red_add(p.total, sum);
    }
    if (kBug != Bug::no_barrier_before_reuse) ptx::syncthreads();
  }
  if (kBug == Bug::arrivals_left && warp == 0) ptx::barrier_arrive(2, kThreads);
}

template <Bug kBug>
Outcome run() {
  Array<float> x(kRows * kDim), results(kRows * kWarps + 1);
  SmallIntegers integers;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(integers.next());
  std::vector<float> expected(results.size());
  float& total = expected.back();
  for (int row = 0; row < kRows; ++row) {
    float sum = 0;
    for (int i = 0; i < kDim; ++i) sum += x[row * kDim + i];
    for (int warp = 0; warp < kWarps; ++warp) expected[row * kWarps + warp] = sum;
    total += sum;
  }
  results[kRows * kWarps] = 0;
  const SumParams p{x.data(), results.data(), results.data() + kRows * kWarps};
  const auto launch = [&](auto... args) {
    return kBug == Bug::no_wait_for_grids ? llmcore::cuda::launch_dependent(block_sum<kBug>, args...)
                                          : llmcore::cuda::launch(block_sum<kBug>, args...);
  };
  return compare(finished(launch(llmcore::cuda::Grid{kCtas}, kThreads, kWarps * 4, kDevice, p)), results, expected);
}

}  // namespace

Correct correct_block_sum() { return {"block_sum", run<Bug::none>}; }

#ifndef __CUDACC__
std::vector<Planted> planted_in_block_sum() {
  using enum Seen;
  return {
      {"block_sum/no_barrier", run<Bug::no_barrier>, wrong_numbers, wrong_numbers, true, true},
      {"block_sum/no_barrier_before_reuse", run<Bug::no_barrier_before_reuse>, wrong_numbers, wrong_numbers, true, true,
       "", true},
      {"block_sum/barrier_skipped_by_a_warp", run<Bug::barrier_skipped_by_a_warp>, error, error, true, true,
       "deadlock: no thread can go on"},
      {"block_sum/barrier_counts_differ", run<Bug::barrier_counts_differ>, error, error, false, false,
       "bar.sync 1 for"},
      {"block_sum/arrivals_left", run<Bug::arrivals_left>, error, error, false, false,
       "ended with 32 arrivals at barrier 2"},
      {"block_sum/shuffle_under_divergence", run<Bug::shuffle_under_divergence>, error, error, false, false,
       "lanes 0000ffff wait at shfl.bfly"},
      {"block_sum/different_shuffles", run<Bug::different_shuffles>, error, error, false, false, "divergence: lane"},
      {"block_sum/shuffle_with_ended_lanes", run<Bug::shuffle_with_ended_lanes>, error, error, false, false, "ended"},
      {"block_sum/plain_add_across_ctas", run<Bug::plain_add_across_ctas>, right, right, true, true},
      {"block_sum/no_wait_for_grids", run<Bug::no_wait_for_grids>, error, error, false, false,
       "ended without griddepcontrol.wait"},
      {"block_sum/plain_add_beside_red_add", run<Bug::plain_add_beside_red_add>, right, right, true, true},
  };
}
#endif

}  // namespace programs
