// Writing new keys and values into a paged cache (the page table of Kwon et al., arXiv 2309.06180).
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// One of keys and values. Strides are in elements; the last dimension is contiguous.
struct CacheSide {
  int64_t head_dim;
  const void* source;         // (tokens, kv_heads, head_dim)
  int64_t source_strides[2];  // of token, head
  void* cache;                // (num_blocks, block_size, kv_heads, head_dim)
  int64_t cache_strides[3];   // of block, offset, head
  float* scale;               // (num_blocks, block_size, kv_heads) when the cache is of 8 bits, else null
  int64_t scale_strides[3];
};

// Token t goes to block slots[t] / block_size, offset slots[t] % block_size; a slot of -1 skips the token. No slot
// occurs twice. A float cache of another dtype converts; a cache of 8 bits holds round_to_even(x / scale) with
// scale = max|x| / largest per token and head, where the largest element is 127 of int8 and 448 of f8. A row of zeros
// has scale 0; a row with inf or NaN has scale NaN, so that it reads back as NaN; the elements of both are 0. A side
// with head_dim 0 is left alone, its scales included.
struct KvCacheWriteParams {
  DType dtype;        // of the sources
  DType cache_dtype;  // any
  int64_t tokens, kv_heads, block_size;
  const int64_t* slots;  // (tokens)
  CacheSide k, v;
};

LLMCORE_CPU_KERNEL(kv_cache_write, KvCacheWriteParams)
LLMCORE_CUDA_KERNEL(kv_cache_write, KvCacheWriteParams)

}  // namespace llmcore
