#include "llmcore/rope.h"

#include "rope_row.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T>
void rotate(const RopeParams& p, const Parallel& par) {
  const int64_t half = p.rotary_dim / 2;
  const float sign = p.inverse ? -1.f : 1.f;
  parallel_ranges(par, p.batch * p.seq, row_grain(p.heads * p.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.seq, t = token % p.seq;
      const int64_t position = p.positions ? p.positions[token] : t;
      const Rotation r{p.cos + position * half, p.sin + position * half, half, p.interleaved, sign};
      for (int64_t h = 0; h < p.heads; ++h) {
        const T* x = static_cast<const T*>(p.x) + b * p.x_strides[0] + t * p.x_strides[1] + h * p.x_strides[2];
        T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + t * p.y_strides[1] + h * p.y_strides[2];
        rotate_row(
            r, [&](int64_t i, auto n) { return load_n(x + i, n); },
            [&](int64_t i, vf v, auto n) { store_n(y + i, v, n); });
        if (x != y) __builtin_memcpy(y + p.rotary_dim, x + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
      }
    }
  });
}

}  // namespace

void rope(const RopeParams& p, const Parallel& par) {
  if (p.heads == 0 || p.head_dim == 0) return;
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, rotate<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
