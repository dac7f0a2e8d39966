// One pass over a fused projection. A token's heads take its angles in turn, which stay in L1; what a head needs of
// itself twice (its mean square, then its elements) is in L1 as well.
#include "llmcore/qk_norm_rope.h"

#include "cache_row.h"
#include "rope_row.h"
#include "scratch.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

Rotation rotation(const QkHeads& h, int64_t token, float sign) {
  const int64_t half = h.rotary_dim / 2;
  if (half == 0) return {nullptr, nullptr, 0, false, sign};
  const int64_t at = (h.positions ? h.positions[token] : token % h.seq) * half;
  return {h.cos + at, h.sin + at, half, h.interleaved, sign};
}

template <class T>
LLMCORE_INLINE float inverse_root(const T* x, int64_t dim, float eps) {
  float squares[1];
  sum_row(dim, squares, [&](int64_t i, auto n, vf* sums) {
    const vf v = load_n(x + i, n);
    sums[0] = fma(v, v, sums[0]);
  });
  return 1.f / __builtin_sqrtf(squares[0] / static_cast<float>(dim) + eps);
}

// The whole head: its pairs rotated, the rest as it is.
template <class Load, class Store>
LLMCORE_INLINE void rotate_head(const Rotation& r, int64_t dim, const Load& load, const Store& store) {
  rotate_row(r, load, store);
  const int64_t first = 2 * r.half;
  for_row(dim - first, [&](int64_t i, auto n) { store(first + i, load(first + i, n), n); });
}

template <class T, class To>
LLMCORE_INLINE void norm_rope_head(const QkHeads& h, const T* weight, const Rotation& r, const T* x, To* y) {
  const auto store = [&](int64_t i, vf v, auto n) { store_n(y + i, v, n); };
  if (!weight) return rotate_head(r, h.head_dim, [&](int64_t i, auto n) { return load_n(x + i, n); }, store);
  const float rstd = inverse_root(x, h.head_dim, h.eps);
  rotate_head(r, h.head_dim, [&](int64_t i, auto n) { return load_n(x + i, n) * rstd * load_n(weight + i, n); }, store);
}

template <class T>
void forward(const QkNormRopeParams& p, const Parallel& par) {
  const QkHeads& h = p.heads;
  const T *q_weight = static_cast<const T*>(h.q_weight), *k_weight = static_cast<const T*>(h.k_weight);
  const int64_t dim = h.head_dim, q_size = h.num_heads * dim, kv_size = h.num_kv_heads * dim;
  parallel_ranges(par, h.tokens, row_grain(q_size + 2 * kv_size), [&](int64_t begin, int64_t end) {
    const Scratch<float> row(dim);
    for (int64_t t = begin; t < end; ++t) {
      const Rotation r = rotation(h, t, 1.f);
      const T *q = static_cast<const T*>(p.qkv) + t * p.qkv_stride, *k = q + q_size, *v = k + kv_size;
      for (int64_t i = 0; i < q_size; i += dim)
        norm_rope_head(h, q_weight, r, q + i, static_cast<T*>(p.q) + t * q_size + i);
      if (!p.cache) {
        for (int64_t i = 0; i < kv_size; i += dim)
          norm_rope_head(h, k_weight, r, k + i, static_cast<T*>(p.k) + t * kv_size + i);
        __builtin_memcpy(static_cast<T*>(p.v) + t * kv_size, v, kv_size * sizeof(T));
        continue;
      }
      const KvCacheWriteParams& c = *p.cache;
      if (c.slots[t] < 0) continue;
      const int64_t block = c.slots[t] / c.block_size, offset = c.slots[t] % c.block_size;
      for (int64_t head = 0; head < h.num_kv_heads; ++head) {
        norm_rope_head(h, k_weight, r, k + head * dim, row.data());
        write_row(c.k, c.cache_dtype, row.data(), block, offset, head);
        write_row(c.v, c.cache_dtype, v + head * dim, block, offset, head);
      }
    }
  });
}

// Of one head. With xhat = x * rstd and dy rotated back to g: dweight += g * xhat, and
// dx = rstd * (g * weight - xhat * mean(g * weight * xhat)); without a norm dx = g.
template <class T>
LLMCORE_INLINE void head_backward(const QkHeads& h, const T* weight, const Rotation& back, const T* dy, const T* x,
                                  float* g, T* dx, float* dweight) {
  const int64_t dim = h.head_dim;
  const auto load = [&](int64_t i, auto n) { return load_n(dy + i, n); };
  if (!weight) return rotate_head(back, dim, load, [&](int64_t i, vf v, auto n) { store_n(dx + i, v, n); });
  rotate_head(back, dim, load, [&](int64_t i, vf v, auto n) { store_n(g + i, v, n); });
  const float rstd = inverse_root(x, dim, h.eps);
  float dot[1];
  sum_row(dim, dot, [&](int64_t i, auto n, vf* sums) {
    sums[0] = fma(load_n(g + i, n) * load_n(weight + i, n), load_n(x + i, n) * rstd, sums[0]);
  });
  const float mean = dot[0] / static_cast<float>(dim);
  for_row(dim, [&](int64_t i, auto n) {
    const vf xhat = load_n(x + i, n) * rstd, d = load_n(g + i, n);
    store_n(dweight + i, fma(d, xhat, load_n(dweight + i, n)), n);
    store_n(dx + i, rstd * (d * load_n(weight + i, n) - xhat * mean), n);
  });
}

template <class T>
class Backward {
 public:
  explicit Backward(const QkNormRopeBackwardParams& p) : p_(p), h_(p.heads) {}

  void run(const Parallel& par) const {
    const int64_t block = qk_sum_tokens(h_.num_heads), blocks = (h_.tokens + block - 1) / block;
    const int64_t dim = h_.head_dim, row = (h_.num_heads + 2 * h_.num_kv_heads) * dim;
    parallel_ranges(par, blocks, row_grain(block * row), [&](int64_t begin, int64_t end) {
      const Scratch<float> g(dim);
      for (int64_t b = begin; b < end; ++b)
        for (int64_t t = b * block; t < (b + 1) * block && t < h_.tokens; ++t) {
          const Rotation back = rotation(h_, t, -1.f);
          const T* x = p_.qkv ? static_cast<const T*>(p_.qkv) + t * p_.qkv_stride : nullptr;
          T* dx = static_cast<T*>(p_.dqkv) + t * row;
          float* dq_weight = p_.dq_weight_partial ? p_.dq_weight_partial + b * dim : nullptr;
          float* dk_weight = p_.dk_weight_partial ? p_.dk_weight_partial + b * dim : nullptr;
          heads(h_.num_heads, h_.q_weight, p_.dq, back, t, x, dx, g.data(), dq_weight);
          heads(h_.num_kv_heads, h_.k_weight, p_.dk, back, t, x, dx, g.data(), dk_weight);
          values(t, dx);
        }
    });
  }

 private:
  static const T* gradient(const HeadGradient& g, int64_t seq, int64_t token, int64_t head) {
    return static_cast<const T*>(g.data) + token / seq * g.strides[0] + token % seq * g.strides[1] +
           head * g.strides[2];
  }

  // Moves x and dx on to the heads that follow.
  void heads(int64_t count, const void* weight, const HeadGradient& gradients, const Rotation& back, int64_t token,
             const T*& x, T*& dx, float* g, float* dweight) const {
    const int64_t dim = h_.head_dim;
    for (int64_t head = 0; head < count; ++head, dx += dim) {
      if (!gradients.data) {
        __builtin_memset(dx, 0, dim * sizeof(T));
        continue;
      }
      head_backward(h_, static_cast<const T*>(weight), back, gradient(gradients, h_.seq, token, head),
                    x ? x + head * dim : nullptr, g, dx, dweight);
    }
    if (x) x += count * dim;
  }

  void values(int64_t token, T* dx) const {
    const int64_t bytes = h_.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t head = 0; head < h_.num_kv_heads; ++head, dx += h_.head_dim) {
      if (p_.dv.data)
        __builtin_memcpy(dx, gradient(p_.dv, h_.seq, token, head), bytes);
      else
        __builtin_memset(dx, 0, bytes);
    }
  }

  const QkNormRopeBackwardParams& p_;
  const QkHeads& h_;
};

}  // namespace

void qk_norm_rope(const QkNormRopeParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.heads.dtype, T, forward<T>(p, par))
}

void qk_norm_rope_backward(const QkNormRopeBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.heads.dtype, T, Backward<T>(p).run(par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
