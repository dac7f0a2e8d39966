#include "llmcore/kv_cache_write.h"

#include "cache_row.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T>
void write_row_of(const KvCacheWriteParams& p, const CacheSide& side, int64_t token, int64_t block, int64_t offset,
                  int64_t head) {
  if (side.head_dim == 0) return;
  const T* x = static_cast<const T*>(side.source) + token * side.source_strides[0] + head * side.source_strides[1];
  write_row(side, p.cache_dtype, x, block, offset, head);
}

template <class T>
void write(const KvCacheWriteParams& p, const Parallel& par) {
  const int64_t elements = p.kv_heads * (p.k.head_dim + p.v.head_dim);
  parallel_ranges(par, p.tokens, row_grain(elements > 0 ? elements : 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (p.slots[token] < 0) continue;
      const int64_t block = p.slots[token] / p.block_size, offset = p.slots[token] % p.block_size;
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        write_row_of<T>(p, p.k, token, block, offset, head);
        write_row_of<T>(p, p.v, token, block, offset, head);
      }
    }
  });
}

}  // namespace

void kv_cache_write(const KvCacheWriteParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, write<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
