// A stable counting sort of (token, slot) pairs by expert. Its data are a few bytes per pair, so what counts is how
// many steps follow one another: two kernels (moe_sort.cuh), in each of which a CTA has a contiguous part of the
// tokens.
#include "moe_sort.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = kSortThreads, kWarps = kThreads / 32;
constexpr int kSharedInts = 24 * 1024;  // 96 KiB: what every device has

PTX_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }

struct Range {
  int64_t begin, end;
};

// The assignments of this CTA.
PTX_DEVICE Range cta_range(const MoeSortParams& p, const SortPlan& plan) {
  const int64_t begin = blockIdx.x * plan.tokens_per_cta, end = begin + plan.tokens_per_cta;
  return {(begin < p.tokens ? begin : p.tokens) * p.top_k, (end < p.tokens ? end : p.tokens) * p.top_k};
}

// Nobody has looked at experts that lie on the device: one that is not there must not lead outside the tables.
PTX_DEVICE int expert_of(const MoeSortParams& p, int64_t assignment) {
  const int32_t e = p.experts[assignment], last = static_cast<int32_t>(p.num_experts) - 1;
  return e < 0 ? 0 : e > last ? last : e;
}

// ---- the counts of each CTA

__global__ void __launch_bounds__(kThreads, 1) count(MoeSortParams p, SortPlan plan) {
  PTX_SHARED_MEMORY(shared);
  const bool fits = p.num_experts <= kSharedInts;
  int32_t* of_cta = static_cast<int32_t*>(p.workspace) + blockIdx.x * p.num_experts;
  int32_t* counts = fits ? reinterpret_cast<int32_t*>(shared) : of_cta;
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
  ptx::syncthreads();
  const Range mine = cta_range(p, plan);
  for (int64_t a = mine.begin + threadIdx.x; a < mine.end; a += kThreads) ptx::red_add(counts + expert_of(p, a), 1);
  if (!fits) return;
  ptx::syncthreads();
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kThreads) of_cta[e] = counts[e];
}

// ---- the rows

// (warps, num_experts): what each warp's assignments have of each expert, then the row of the warp's next one. And for
// each expert, the assignments of the CTAs before, and of all.
struct Table {
  int32_t* rows;
  int32_t* before;
  int32_t* all;
  int32_t* warp_sums;  // (kWarps)
};

PTX_DEVICE Table table_of(const MoeSortParams& p, const SortPlan& plan, uint8_t* shared) {
  int32_t* const sums = reinterpret_cast<int32_t*>(shared);
  int32_t* const rows =
      plan.table_ints ? static_cast<int32_t*>(p.workspace) + plan.ctas * p.num_experts + blockIdx.x * plan.table_ints
                      : sums + kWarps;
  int32_t* const before = rows + plan.warps * p.num_experts;
  return {rows, before, before + p.num_experts, sums};
}

// The lanes whose assignment has this lane's expert; none for a lane without one (expert -1).
PTX_DEVICE uint32_t peers_of(int expert, int bits) {
  uint32_t peers = ptx::ballot(expert >= 0);
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = expert >> bit & 1;
    const uint32_t votes = ptx::ballot(set);
    peers &= set ? votes : ~votes;
  }
  return expert >= 0 ? peers : 0;
}

// f(assignment, expert, its rank among those of its expert here, how many those are) for the assignments of this warp,
// 32 at a time in their order. All lanes call f; expert is -1 for those without an assignment.
template <class F>
PTX_DEVICE void walk(const MoeSortParams& p, const SortPlan& plan, const F& f) {
  const Range cta = cta_range(p, plan);
  const int64_t share = (cta.end - cta.begin + 32 * plan.warps - 1) / (32 * plan.warps) * 32;
  const int64_t begin = cta.begin + threadIdx.x / 32 * share, end = begin + share < cta.end ? begin + share : cta.end;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t a = first + lane_id();
    const int expert = a < end ? expert_of(p, a) : -1;
    const uint32_t peers = peers_of(expert, plan.expert_bits);
    f(a, expert, ptx::popcount(peers & ((1u << lane_id()) - 1)), ptx::popcount(peers));
  }
}

// table.before and table.all, which are 0, out of the counts of the CTAs. Integers: in any order the same.
PTX_DEVICE void add_counts(const MoeSortParams& p, const SortPlan& plan, const Table& table) {
  const int64_t parts = p.num_experts < kThreads ? kThreads / p.num_experts : 1;  // that the CTAs' counts are cut into
  const int32_t* counts = static_cast<const int32_t*>(p.workspace);
  for (int64_t i = threadIdx.x; i < parts * p.num_experts; i += kThreads) {
    const int64_t e = i % p.num_experts;
    int32_t before = 0, all = 0;
#pragma unroll 8
    for (int cta = static_cast<int>(i / p.num_experts); cta < plan.ctas; cta += static_cast<int>(parts)) {
      const int32_t n = counts[cta * p.num_experts + e];
      all += n;
      before += cta < static_cast<int>(blockIdx.x) ? n : 0;
    }
    ptx::red_add(table.before + e, before);
    ptx::red_add(table.all + e, all);
  }
}

PTX_DEVICE int32_t inclusive_warp_scan(int32_t x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = static_cast<int32_t>(ptx::shfl(static_cast<uint32_t>(x), lane_id() - distance));
    if (lane_id() >= distance) x += below;
  }
  return x;
}

// Turns the table's counts into rows: after the rows of lower experts come those of the CTAs before, then those of the
// warps before. Ends at a barrier.
PTX_DEVICE void scan(const MoeSortParams& p, const SortPlan& plan, const Table& table) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int32_t lower = 0;  // rows of experts below this round's
  for (int64_t first = 0; first < p.num_experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    const int32_t all = e < p.num_experts ? table.all[e] : 0;
    const int32_t in_warp = inclusive_warp_scan(all);
    if (lane_id() == 31) table.warp_sums[warp] = in_warp;
    ptx::syncthreads();
    const int32_t warps = inclusive_warp_scan(table.warp_sums[lane_id()]);
    const int32_t up_to_warp = static_cast<int32_t>(ptx::shfl(static_cast<uint32_t>(warps), warp));
    const int32_t offset = lower + up_to_warp - table.warp_sums[warp] + in_warp - all;
    lower += static_cast<int32_t>(ptx::shfl(static_cast<uint32_t>(warps), kWarps - 1));
    if (e < p.num_experts) {
      if (blockIdx.x == 0) p.offsets[e] = offset;
      int32_t row = offset + table.before[e];
      for (int w = 0; w < plan.warps; ++w) {
        int32_t& at = table.rows[w * p.num_experts + e];
        const int32_t n = at;
        at = row;
        row += n;
      }
    }
    ptx::syncthreads();  // the sums have been read, and rows are there
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[p.num_experts] = lower;
}

__global__ void __launch_bounds__(kThreads, 1) write_rows(MoeSortParams p, SortPlan plan) {
  PTX_SHARED_MEMORY(shared);
  const Table table = table_of(p, plan, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t i = threadIdx.x; i < (plan.warps + 2) * p.num_experts; i += kThreads) table.rows[i] = 0;
  ptx::syncthreads();
  int32_t* const mine = table.rows + warp * p.num_experts;
  if (warp < plan.warps)
    walk(p, plan, [&](int64_t, int expert, int rank, int peers) {
      if (expert >= 0 && rank == 0) mine[expert] += peers;
      ptx::syncwarp();
    });
  add_counts(p, plan, table);
  ptx::syncthreads();
  scan(p, plan, table);
  if (warp >= plan.warps) return;
  walk(p, plan, [&](int64_t assignment, int expert, int rank, int peers) {
    const int32_t row = expert >= 0 ? mine[expert] + rank : 0;
    ptx::syncwarp();
    if (expert >= 0 && rank == 0) mine[expert] = row + peers;
    if (expert >= 0) {
      p.row_of[assignment] = row;
      if (p.token_of) p.token_of[row] = static_cast<int32_t>(assignment / p.top_k);
    }
    ptx::syncwarp();
  });
}

}  // namespace

SortPlan sort_plan(int64_t tokens, int64_t num_experts, const Device& device) {
  SortPlan plan{};
  const int64_t fewest = 32;  // tokens of a CTA: one for each warp of the router
  int64_t ctas = (tokens + fewest - 1) / fewest;
  if (ctas > device.multiprocessors) ctas = device.multiprocessors;
  if (ctas < 1) ctas = 1;  // without tokens there are still offsets
  plan.tokens_per_cta = (tokens + ctas - 1) / ctas;
  plan.ctas = static_cast<int>(ctas);
  const int64_t room = (kSharedInts - kWarps) / num_experts - 2;
  plan.warps = static_cast<int>(room > kWarps ? kWarps : room < 1 ? 1 : room);
  const int64_t table = (plan.warps + 2) * num_experts;
  plan.table_ints = room < 1 ? table : 0;
  plan.shared_bytes = static_cast<int>((kWarps + (room < 1 ? 0 : table)) * static_cast<int64_t>(sizeof(int32_t)));
  while ((num_experts - 1) >> plan.expert_bits) ++plan.expert_bits;
  return plan;
}

Status write_sorted_rows(const MoeSortParams& p, const SortPlan& plan, const Device& device) {
  return launch(write_rows, {plan.ctas}, kThreads, plan.shared_bytes, device, p, plan);
}

int64_t moe_sort_workspace(const MoeSortParams& p, const Device& device) {
  return sort_workspace(sort_plan(p.tokens, p.num_experts, device), p.num_experts);
}

Status moe_sort(const MoeSortParams& p, const Device& device) {
  const SortPlan plan = sort_plan(p.tokens, p.num_experts, device);
  const int64_t ints = p.num_experts <= kSharedInts ? p.num_experts : 0;
  if (Status error = launch(count, {plan.ctas}, kThreads, static_cast<int>(ints * 4), device, p, plan)) return error;
  return write_sorted_rows(p, plan, device);
}

}  // namespace cuda
}  // namespace llmcore
