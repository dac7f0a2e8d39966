// What qk_norm_rope shares with rope and kv_cache_write: their checks, under the name of the op that was called.
#pragma once
#include "common.h"
#include "llmcore/kv_cache_write.h"

namespace llmcore {

// Tables and positions as the kernels read them.
struct RopeTables {
  Tensor cos, sin;      // contiguous float32
  OptTensor positions;  // dense int64
  int64_t rotary_dim() const { return 2 * cos.size(1); }
  const float* cos_data() const { return static_cast<const float*>(cos.const_data_ptr()); }
  const float* sin_data() const { return static_cast<const float*>(sin.const_data_ptr()); }
  const int64_t* positions_data() const {
    return positions ? static_cast<const int64_t*>(positions->const_data_ptr()) : nullptr;
  }
};
// `x` has heads of `head_dim` elements for tokens of shape {batch, seq} or {total}. Positions on a CUDA device are not
// looked at.
RopeTables checked_tables(const std::string& op, const char* x_name, const Tensor& x,
                          std::initializer_list<int64_t> tokens, int64_t head_dim, const Tensor& cos, const Tensor& sin,
                          const OptTensor& positions);

struct CacheWrite {
  Tensor slots, k, v;  // what params points into
  KvCacheWriteParams params;
};
CacheWrite checked_cache_write(const std::string& op, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& slot_mapping, const OptTensor& k_scale,
                               const OptTensor& v_scale);

}  // namespace llmcore
