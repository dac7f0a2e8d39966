#include "llmcore/linear.h"

#include "few_rows.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

static_assert(kLinearRows <= kFewRows, "the kernel takes fewer rows than the op");

constexpr int64_t kSerialBytes = 65536;  // of a weight that one thread reads before a second would have started
constexpr int64_t kTasksPerThread = 4;   // long stretches of memory for each thread, and yet some to even out

template <class T>
void forward(const LinearParams& p, const Parallel& par) {
  if (p.rows == 0 || p.n == 0) return;
  const PackedRows<T> x(p.rows, p.k, [&](int64_t r) { return static_cast<const T*>(p.x) + r * p.x_stride; });
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  const int64_t bytes = p.n * p.k * sizeof(T), groups = (p.n + kGroup - 1) / kGroup;
  int64_t tasks = bytes <= kSerialBytes ? 1 : par.threads == 1 ? 1 : par.threads * kTasksPerThread;
  if (tasks > groups) tasks = groups;
  parallel_tasks(par, tasks, [&](int64_t task, int64_t) {
    const int64_t begin = groups * task / tasks * kGroup, end = groups * (task + 1) / tasks * kGroup;
    dot_product_rows<T>((end < p.n ? end : p.n) - begin, p.k, x, weight + begin * p.weight_stride, p.weight_stride,
                        bias ? bias + begin : nullptr, static_cast<T*>(p.y) + begin, p.n);
  });
}

}  // namespace

void linear(const LinearParams& p, const Parallel& par) { LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T>(p, par)) }

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
