// How a CPU kernel runs in parallel: the binding hands in torch's own thread pool, so that the process holds one pool.
#pragma once
#include <cstdint>

namespace llmcore {

struct Parallel {
  int threads;  // how many workers `run` may use, >= 1
  // Calls body(ctx, w) once for every w in [0, workers), on up to `threads` threads, and returns when all are done.
  // Calls nested in a body run serially.
  void (*run)(int64_t workers, void* ctx, void (*body)(void* ctx, int64_t worker));
};

// A gradient that is a sum over rows is summed by blocks of this many rows, and the binding sums the blocks: a longer
// chain of float32 additions loses more than torch's own sum does.
constexpr int64_t kSumRows = 32;

// Compiled into every kernel file; in an instruction-set namespace so that no copy is shared between instruction sets.
#ifdef LLMCORE_ISA
namespace cpu {
namespace LLMCORE_ISA {

// The grain of parallel_ranges over rows of `dim` >= 1 elements: below 16384 elements a thread costs more than it
// saves.
inline int64_t row_grain(int64_t dim) { return 16384 / dim + 1; }

// f(begin, end): contiguous ranges of [0, n), at least `grain` long, one per thread. For work of even cost.
template <class F>
inline void parallel_ranges(const Parallel& par, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  int64_t workers = (n + grain - 1) / grain;
  if (workers > par.threads) workers = par.threads;
  if (workers <= 1) {
    f(int64_t{0}, n);
    return;
  }
  struct Ctx {
    const F* f;
    int64_t n, workers;
  } ctx{&f, n, workers};
  par.run(workers, &ctx, [](void* c, int64_t w) {
    auto& x = *static_cast<Ctx*>(c);
    (*x.f)(x.n* w / x.workers, x.n * (w + 1) / x.workers);
  });
}

// f(task, worker): tasks 0..n-1 handed out one by one in order, so that uneven tasks balance (put the heaviest first).
// `worker` < par.threads indexes per-worker scratch.
template <class F>
inline void parallel_tasks(const Parallel& par, int64_t n, const F& f) {
  if (n <= 0) return;
  int64_t workers = n < par.threads ? n : par.threads;
  if (workers <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i, int64_t{0});
    return;
  }
  struct Ctx {
    const F* f;
    int64_t n, next;
  } ctx{&f, n, 0};
  par.run(workers, &ctx, [](void* c, int64_t w) {
    auto& x = *static_cast<Ctx*>(c);
    for (;;) {
      int64_t i = __atomic_fetch_add(&x.next, 1, __ATOMIC_RELAXED);
      if (i >= x.n) return;
      (*x.f)(i, w);
    }
  });
}

// The same, but of many tasks each worker takes the first three quarters by a fixed rule, there and back, so that from
// call to call the same rows are in the same core's cache; the rest is handed out.
template <class F>
inline void parallel_own_tasks(const Parallel& par, int64_t n, const F& f) {
  const int64_t workers = n < par.threads ? n : par.threads, rounds = workers > 0 ? n / workers : 0;
  if (workers <= 1 || rounds < 8) {
    parallel_tasks(par, n, f);
    return;
  }
  struct Ctx {
    const F* f;
    int64_t n, workers, rounds, next;
  } ctx{&f, n, workers, rounds * 3 / 4, rounds * 3 / 4 * workers};
  par.run(workers, &ctx, [](void* c, int64_t w) {
    auto& x = *static_cast<Ctx*>(c);
    for (int64_t i = 0; i < x.rounds; ++i) (*x.f)(i* x.workers + (i % 2 ? x.workers - 1 - w : w), w);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&x.next, 1, __ATOMIC_RELAXED);
      if (i >= x.n) return;
      (*x.f)(i, w);
    }
  });
}

// f(block, begin, end): rows [begin, end) of [0, rows) in blocks of kSumRows. A thread takes about the rows that it
// takes in parallel_ranges: a backward pass finds what the forward pass left in its core's cache.
template <class F>
inline void parallel_row_blocks(const Parallel& par, int64_t rows, const F& f) {
  parallel_ranges(par, (rows + kSumRows - 1) / kSumRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kSumRows, end = begin + kSumRows;
      f(block, begin, end < rows ? end : rows);
    }
  });
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
#endif

}  // namespace llmcore
