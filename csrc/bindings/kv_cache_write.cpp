#include "llmcore/kv_cache_write.h"

#include <algorithm>

#include "common.h"
#include "rope_and_cache.h"

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
Tensor check_slots(const std::string& op, const Tensor& slot_mapping, const Tensor& k, int64_t tokens, int64_t slots) {
  const std::string what = op + ": slot_mapping";
  check_shape(slot_mapping, {tokens}, what.c_str());
  check_device(slot_mapping, k, what.c_str());
  const Tensor mapping = indices(slot_mapping, what.c_str());
  if (!mapping.is_cpu()) return mapping;
  const IndexValues values = values_of(mapping);
  bool rising = true;
  int64_t previous = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    LLMCORE_CHECK(values[t] >= -1 && values[t] < slots, op, ": slot ", values[t], " (token ", t,
                  ") is outside the cache of ", slots, " slots; accepted: 0 to ", slots - 1, ", or -1 to skip");
    if (values[t] == -1) continue;
    rising = rising && values[t] > previous;
    previous = values[t];
  }
  if (!rising) {  // which of two tokens in one slot would win is anyone's guess
    std::vector<int64_t> sorted(values.data, values.data + values.size);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t t = 1; t < tokens; ++t)
      LLMCORE_CHECK(sorted[t] == -1 || sorted[t] != sorted[t - 1], op, ": slot ", sorted[t],
                    " is given to more than one token; every slot but -1 may occur once");
  }
  return mapping;
}

}  // namespace

CacheWrite checked_cache_write(const std::string& op, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& slot_mapping, const OptTensor& k_scale,
                               const OptTensor& v_scale) {
  const auto named = [&](const char* argument) { return op + ": " + argument; };
  const DType dtype = float_dtype(k, named("k").c_str());
  check_dim(k, 3, named("k").c_str(), "(tokens, kv_heads, head_dim)");
  check_dim(v, 3, named("v").c_str(), "(tokens, kv_heads, v_head_dim)");
  check_like(v, k, {k.size(0), k.size(1), v.size(2)}, named("v").c_str(), "k");
  check_device(k_cache, k, named("k_cache").c_str());
  const DType to = cache_dtype(k_cache, named("k_cache").c_str());
  check_dim(k_cache, 4, named("k_cache").c_str(), "(num_blocks, block_size, kv_heads, head_dim)");
  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(1);
  check_shape(k_cache, {blocks, block_size, k.size(1), k.size(2)}, named("k_cache").c_str());
  check_like(v_cache, k_cache, {blocks, block_size, v.size(1), v.size(2)}, named("v_cache").c_str(), "k_cache");
  check_writable(k_cache, named("k_cache").c_str());
  check_writable(v_cache, named("v_cache").c_str());
  for (const OptTensor* scale : {&k_scale, &v_scale}) {
    const std::string what = named(scale == &k_scale ? "k_scale" : "v_scale");
    LLMCORE_CHECK(scale->has_value() == has_scales(to), what, scale->has_value() ? " is given" : " is missing",
                  ", but the cache has dtype ", name(to), "; int8 and float8_e4m3fn caches have scales, others none");
    if (!scale->has_value()) continue;
    check_device(**scale, k, what.c_str());
    check_dtype(**scale, ScalarType::Float, what.c_str());
    check_shape(**scale, {blocks, block_size, k.size(1)}, what.c_str());
    check_writable(**scale, what.c_str());
  }
  CacheWrite write{check_slots(op, slot_mapping, k, k.size(0), blocks * block_size),
                   last_dim_contiguous(k),
                   last_dim_contiguous(v),
                   {}};
  write.params = {dtype,
                  to,
                  k.size(0),
                  k.size(1),
                  block_size,
                  static_cast<const int64_t*>(write.slots.const_data_ptr()),
                  side(write.k, k_cache, k_scale),
                  side(write.v, v_cache, v_scale)};
  return write;
}

namespace {

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot_mapping, const OptTensor& k_scale, const OptTensor& v_scale) {
  const CacheWrite write =
      checked_cache_write("kv_cache_write", k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  LLMCORE_RUN(kv_cache_write, k, write.params);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("kv_cache_write", TORCH_BOX(&kv_cache_write));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
