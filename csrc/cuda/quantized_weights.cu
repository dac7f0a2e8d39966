// Rows of a packed quantised weight as numbers.
#include "launch.cuh"
#include "quantized_panel.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// q less its offset of weight i (0 ... 31) of a block, of the row that `lines` points to.
template <class F>
PTX_DEVICE float quant_of(const uint8_t* lines, int i) {
  const int g = i / 4;
  const uint8_t* at = lines + i % 4;
  int q;
  if constexpr (F::kBits == 8) {
    q = at[g * 64];
  } else {
    q = at[g % 4 * 64] >> (g / 4 * 4) & 15;
    if constexpr (F::kBits == 5) q |= (at[256] >> g & 1) << 4;
    if constexpr (F::kBits == 6) q |= (at[256 + g / 4 * 64] >> (g % 4 * 2) & 3) << 4;
  }
  return static_cast<float>(q - F::kOffset);
}

// A CTA takes ids in turns, its threads the elements of a row.
template <class F, class T>
__global__ void __launch_bounds__(kThreads)
    gather(QuantizedEmbeddingParams p, int64_t scale_bytes, int64_t panel_bytes) {
  for (int64_t i = blockIdx.x; i < p.count; i += gridDim.x) {
    const int64_t id = p.ids[i];
    T* y = static_cast<T*>(p.y) + i * p.k;
    const bool known = id >= 0 && id < p.n;
    const uint8_t* panel = p.weight + (known ? id / kPanel * panel_bytes : 0);
    const int r = static_cast<int>(known ? id % kPanel : 0);
    for (int64_t j = threadIdx.x; j < p.k; j += kThreads) {
      float value = ptx::from_bits(0x7fc00000u);
      if (known) {
        const int64_t b = j / kBlock;
        const int at = static_cast<int>(j % kBlock);
        const Scales s = scales_of<F>(panel, b, r);
        value = s.scale[at / 16] * quant_of<F>(panel + scale_bytes + b * F::kBlockBytes + r * 4, at) + s.addend;
      }
      y[j] = from_float<T>(value);
    }
  }
}

template <class F, class T>
Status start(const QuantizedEmbeddingParams& p, const Device& device) {
  constexpr QuantLayout kLayout = kQuantLayouts[static_cast<int>(F::kFormat)];
  const int64_t most = 32 * int64_t{device.multiprocessors};
  return launch(gather<F, T>, {p.count < most ? p.count : most}, kThreads, 0, device, p,
                quant_scale_bytes(kLayout, p.k), quant_panel_bytes(kLayout, p.k));
}

}  // namespace

Status quantized_embedding(const QuantizedEmbeddingParams& p, const Device& device) {
  LLMCORE_DISPATCH_QUANT(p.format, F, LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (start<F, T>(p, device))))
  return "unknown dtype or format";
}

}  // namespace cuda
}  // namespace llmcore
