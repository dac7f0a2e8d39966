#include "llmcore/kv_cache_write.h"

#include "case.h"

using namespace llmcore;
using namespace races;

RACE_CASE(kv_cache_write) {
  constexpr int64_t kTokens = 5, kHeads = 2, kBlocks = 3, kBlockSize = 4;
  const std::vector<int64_t> slots = {7, 0, -1, 11, 2};
  for (DType dtype : kFloats)
    for (DType cache_dtype : {DType::f32, DType::bf16, DType::f16, DType::i8, DType::f8})
      for (int64_t dim : {64, 37}) {  // of the keys; the values are narrower
        const int64_t dims[] = {dim, dim - 16};
        const Tensor k = random_normal(dtype, kTokens * kHeads * dims[0]),
                     v = random_normal(dtype, kTokens * kHeads * dims[1]);
        const bool scaled = has_scales(cache_dtype);
        constexpr int64_t kRows = kBlocks * kBlockSize * kHeads;
        Tensor k_cache(cache_dtype, kRows * dims[0]), v_cache(cache_dtype, kRows * dims[1]),
            k_scale(DType::f32, scaled ? kRows : 0), v_scale(DType::f32, scaled ? kRows : 0);
        const auto side = [&](int64_t d, const Tensor& source, Tensor& cache, Tensor& scale) {
          return CacheSide{d,
                           source.data(),
                           {kHeads * d, d},
                           cache.data(),
                           {kBlockSize * kHeads * d, kHeads * d, d},
                           scaled ? scale.as<float>() : nullptr,
                           {kBlockSize * kHeads, kHeads, 1}};
        };
        const KvCacheWriteParams p{dtype,
                                   cache_dtype,
                                   kTokens,
                                   kHeads,
                                   kBlockSize,
                                   slots.data(),
                                   side(dims[0], k, k_cache, k_scale),
                                   side(dims[1], v, v_cache, v_scale)};
        check(name(cache_dtype), BOTH(kv_cache_write), p,
              {{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_scale", k_scale}, {"v_scale", v_scale}});
      }
}
