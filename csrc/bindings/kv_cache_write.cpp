#include "llmcore/kv_cache_write.h"

#include <algorithm>

#include "common.h"

namespace llmcore {
namespace {

CacheSide side(const Tensor& source, const Tensor& cache, const OptTensor& scale) {
  CacheSide s{source.size(2),
              source.const_data_ptr(),
              {source.stride(0), source.stride(1)},
              cache.mutable_data_ptr(),
              {cache.stride(0), cache.stride(1), cache.stride(2)},
              nullptr,
              {0, 0, 0}};
  if (scale) {
    s.scale = static_cast<float*>(scale->mutable_data_ptr());
    for (int d = 0; d < 3; ++d) s.scale_strides[d] = scale->stride(d);
  }
  return s;
}

// The slots as dense int64. On a CUDA device they are not looked at.
Tensor check_slots(const Tensor& slot_mapping, const Tensor& k, int64_t tokens, int64_t slots) {
  check_shape(slot_mapping, {tokens}, "kv_cache_write: slot_mapping");
  check_device(slot_mapping, k, "kv_cache_write: slot_mapping");
  const Tensor mapping = indices(slot_mapping, "kv_cache_write: slot_mapping");
  if (!mapping.is_cpu()) return mapping;
  const IndexValues values = values_of(mapping);
  bool rising = true;
  int64_t previous = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    LLMCORE_CHECK(values[t] >= -1 && values[t] < slots, "kv_cache_write: slot ", values[t], " (token ", t,
                  ") is outside the cache of ", slots, " slots; accepted: 0 to ", slots - 1, ", or -1 to skip");
    if (values[t] == -1) continue;
    rising = rising && values[t] > previous;
    previous = values[t];
  }
  if (!rising) {  // which of two tokens in one slot would win is anyone's guess
    std::vector<int64_t> sorted(values.data, values.data + values.size);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t t = 1; t < tokens; ++t)
      LLMCORE_CHECK(sorted[t] == -1 || sorted[t] != sorted[t - 1], "kv_cache_write: slot ", sorted[t],
                    " is given to more than one token; every slot but -1 may occur once");
  }
  return mapping;
}

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot_mapping, const OptTensor& k_scale, const OptTensor& v_scale) {
  const DType dtype = float_dtype(k, "kv_cache_write: k");
  check_dim(k, 3, "kv_cache_write: k", "(tokens, kv_heads, head_dim)");
  check_dim(v, 3, "kv_cache_write: v", "(tokens, kv_heads, v_head_dim)");
  check_like(v, k, {k.size(0), k.size(1), v.size(2)}, "kv_cache_write: v", "k");
  check_device(k_cache, k, "kv_cache_write: k_cache");
  const DType to = cache_dtype(k_cache, "kv_cache_write: k_cache");
  check_dim(k_cache, 4, "kv_cache_write: k_cache", "(num_blocks, block_size, kv_heads, head_dim)");
  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(1);
  check_shape(k_cache, {blocks, block_size, k.size(1), k.size(2)}, "kv_cache_write: k_cache");
  check_like(v_cache, k_cache, {blocks, block_size, v.size(1), v.size(2)}, "kv_cache_write: v_cache", "k_cache");
  check_writable(k_cache, "kv_cache_write: k_cache");
  check_writable(v_cache, "kv_cache_write: v_cache");
  for (const OptTensor* scale : {&k_scale, &v_scale}) {
    const char* what = scale == &k_scale ? "kv_cache_write: k_scale" : "kv_cache_write: v_scale";
    LLMCORE_CHECK(scale->has_value() == has_scales(to), what, scale->has_value() ? " is given" : " is missing",
                  ", but the cache has dtype ", name(to), "; int8 and float8_e4m3fn caches have scales, others none");
    if (!scale->has_value()) continue;
    check_device(**scale, k, what);
    check_dtype(**scale, ScalarType::Float, what);
    check_shape(**scale, {blocks, block_size, k.size(1)}, what);
    check_writable(**scale, what);
  }
  const Tensor slots = check_slots(slot_mapping, k, k.size(0), blocks * block_size);
  const Tensor k_rows = last_dim_contiguous(k), v_rows = last_dim_contiguous(v);
  KvCacheWriteParams p{dtype,
                       to,
                       k.size(0),
                       k.size(1),
                       block_size,
                       static_cast<const int64_t*>(slots.const_data_ptr()),
                       side(k_rows, k_cache, k_scale),
                       side(v_rows, v_cache, v_scale)};
  LLMCORE_RUN(kv_cache_write, k, p);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("kv_cache_write", TORCH_BOX(&kv_cache_write));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
