// Working memory of the kernels that split one product among threads into tiles.
#pragma once
#include "gemm.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// Per worker: gemm's packing buffers, and a float tile of `tile` elements for what is rounded or reduced afterwards.
class GemmWorkers {
 public:
  GemmWorkers(int threads, int64_t tile) : tile_(tile), tiles_(threads * tile), packing_(new GemmScratch[threads]) {}
  ~GemmWorkers() { delete[] packing_; }
  GemmWorkers(const GemmWorkers&) = delete;
  GemmWorkers& operator=(const GemmWorkers&) = delete;
  GemmScratch& packing(int64_t worker) { return packing_[worker]; }
  float* tile(int64_t worker) { return tiles_.data() + worker * tile_; }

 private:
  int64_t tile_;
  Scratch<float> tiles_;
  GemmScratch* packing_;
};

template <class T>
inline void store_row(T* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_n(out + i, load_n(in + i, n - i), n - i);
}

// gemm() into a matrix of T with row stride out_stride: straight into it when it is float, else by way of `tile` (m,
// n).
template <class T, class TA, class TB>
inline void gemm_to(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, T* out, int64_t out_stride,
                    float* tile, GemmScratch& packing) {
  if constexpr (sizeof(T) == sizeof(float)) {
    gemm(m, n, k, a, b, out, out_stride, false, packing);
  } else {
    gemm(m, n, k, a, b, tile, n, false, packing);
    for (int64_t i = 0; i < m; ++i) store_row(out + i * out_stride, tile + i * n, n);
  }
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
