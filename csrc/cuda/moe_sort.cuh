// How assignments, (token, slot) pairs in token order, are shared out among CTAs to be sorted by expert. Two kernels:
//   one counts what each CTA's assignments have of each expert: in moe_sort.cu for experts that are given, and the
//       router itself for those it chooses;
//   the other, in moe_sort.cu, adds up the counts of the CTAs before and writes the rows.
// No CTA waits for another, and nothing depends on the order in which they run.
#pragma once
#include "launch.cuh"
#include "llmcore/moe_permute.h"

namespace llmcore {
namespace cuda {

// Both kernels: large CTAs, since each CTA of the second reads the counts of all.
constexpr int kSortThreads = 1024;

struct SortPlan {
  int64_t tokens_per_cta;
  int ctas;            // at least 1, and at most one for each multiprocessor
  int warps;           // of a CTA, that have a row of the table of counts: as many as it has room for
  int expert_bits;     // num_experts - 1 has so many
  int shared_bytes;    // of the second kernel
  int64_t table_ints;  // of its table, for each CTA, in the workspace: 0 where the table is in shared memory
};

SortPlan sort_plan(int64_t tokens, int64_t num_experts, const Device& device);

// The workspace: counts (ctas, num_experts), then the tables.
__host__ __device__ inline int64_t sort_workspace(const SortPlan& plan, int64_t num_experts) {
  return plan.ctas * (num_experts + plan.table_ints) * static_cast<int64_t>(sizeof(int32_t));
}

// The second kernel.
Status write_sorted_rows(const MoeSortParams& p, const SortPlan& plan, const Device& device);

}  // namespace cuda
}  // namespace llmcore
