// Writing new keys and values into a paged cache. Bound by memory: an element is read once and written once, also when
// it is quantised to 8 bits, as the row's scale is found while the row waits in registers (up to 256 elements; 64 where
// they are read one by one).
#include "llmcore/kv_cache_write.h"

#include <type_traits>

#include "launch.cuh"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// A row, one token's head, is head_dim elements: 64 to 256, mostly. So few threads that none idles.
constexpr int kTeam = 8;
// Elements a thread keeps of a row; where they are read one by one, each takes a register for itself, and an address.
template <int Width>
constexpr int kHeld = Width == 1 ? 8 : 32;

// As many elements as make 16 bytes in the narrower of the two dtypes.
template <class T, class C>
constexpr int kWidth = 16 / (sizeof(T) < sizeof(C) ? sizeof(T) : sizeof(C));

template <class C>
constexpr bool kQuantised = sizeof(C) == 1;  // int8_t and f8
template <class C>
constexpr float kLargest = std::is_same_v<C, f8> ? kLargestF8 : kLargestI8;

// The byte of x / scale as a C.
template <class C>
PTX_DEVICE uint32_t quantised(float x, float scale) {
  // a subnormal scale is coarse: the quotient may pass the largest element
  const float quotient = fminf(fmaxf(x / scale, -kLargest<C>), kLargest<C>);
  if constexpr (std::is_same_v<C, f8>)
    return f8_bits(quotient);
  else
    return static_cast<uint32_t>(static_cast<int>(rintf(quotient))) & 255u;
}

template <class C, int Width>
PTX_DEVICE void store_quantised(uint8_t* q, const float (&x)[Width], float scale) {
  if constexpr (Width == 1) {
    *q = static_cast<uint8_t>(quantised<C>(x[0], scale));
  } else {
    static_assert(Width == 16);
    ptx::Vec16 v = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) v.x[i / 4] |= quantised<C>(x[i], scale) << 8 * (i % 4);
    ptx::store_global_16(q, v);
  }
}
template <int Width>
PTX_DEVICE void store_zeros(uint8_t* q) {
  if constexpr (Width == 1)
    *q = 0;
  else
    ptx::store_global_16(q, {});
}

// A team without a row passes dim 0, and gets as far as the shuffles of its warp. `scale` may then be null.
template <class T, class C, int Width>
PTX_DEVICE void write_quantised(const T* x, uint8_t* q, float* scale_out, int64_t dim) {
  using Mine = Team<kTeam, Width, kHeld<Width>>;
  Packed<T, Width> held[Mine::kChunks] = {};
  Mine::held(dim, [&](int j, int64_t column) { held[j] = fetch<Width>(x + column); });
  const auto for_row = [&](const auto& f) {  // f(column, values)
    float v[Width];
    Mine::held(dim, [&](int j, int64_t column) {
      unpack(held[j], v);
      f(column, v);
    });
    Mine::rest(dim, [&](int64_t column) {
      load(x + column, v);
      f(column, v);
    });
  };
  float largest = 0.f, poison = 0.f;
  for_row([&](int64_t, const float(&v)[Width]) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      largest = fmaxf(largest, fabsf(v[i]));
      poison += v[i] * 0.f;  // NaN from inf and NaN
    }
  });
  const float scale = lanes_max<kTeam>(largest) / kLargest<C>;
  const bool finite = lanes_sum<kTeam>(poison) == 0.f;
  if (dim > 0 && threadIdx.x % kTeam == 0) *scale_out = finite ? scale : ptx::from_bits(0x7fc00000);
  if (finite && scale != 0.f)
    for_row([&](int64_t column, const float(&v)[Width]) { store_quantised<C>(q + column, v, scale); });
  else
    for_row([&](int64_t column, const float(&)[Width]) { store_zeros<Width>(q + column); });
}

template <class T, class C, int Width>
PTX_DEVICE void convert(const Packed<T, Width>& x, C* y) {
  if constexpr (std::is_same_v<T, C>) {
    put(y, x);
  } else {
    float v[Width];
    unpack(x, v);
    store(y, v);
  }
}
template <class T, class C, int Width>
PTX_DEVICE void write_converted(const T* x, C* y, int64_t dim) {
  using Mine = Team<kTeam, Width, kHeld<Width>>;
  Packed<T, Width> held[Mine::kChunks] = {};  // all loads before the first store, which waits for them
  Mine::held(dim, [&](int j, int64_t column) { held[j] = fetch<Width>(x + column); });
  Mine::held(dim, [&](int j, int64_t column) { convert(held[j], y + column); });
  Mine::rest(dim, [&](int64_t column) { convert(fetch<Width>(x + column), y + column); });
}

template <class T, class C, int Width>
PTX_DEVICE void write_side(const KvCacheWriteParams& p, const CacheSide& side) {
  constexpr int64_t kRows = kThreads / kTeam;
  const int64_t rows = p.tokens * p.kv_heads;
  for (int64_t first = blockIdx.x * kRows; first < rows; first += gridDim.x * kRows) {
    const int64_t row = first + threadIdx.x / kTeam, token = row / p.kv_heads, head = row % p.kv_heads;
    const int64_t slot = row < rows ? p.slots[token] : -1;
    const int64_t dim = slot < 0 ? 0 : side.head_dim, block = slot / p.block_size, offset = slot % p.block_size;
    const T* x = static_cast<const T*>(side.source) + token * side.source_strides[0] + head * side.source_strides[1];
    C* y = static_cast<C*>(side.cache) + block * side.cache_strides[0] + offset * side.cache_strides[1] +
           head * side.cache_strides[2];
    if constexpr (kQuantised<C>)
      write_quantised<T, C, Width>(
          x, reinterpret_cast<uint8_t*>(y),
          side.scale + block * side.scale_strides[0] + offset * side.scale_strides[1] + head * side.scale_strides[2],
          dim);
    else
      write_converted<T, C, Width>(x, y, dim);
  }
}

// The grid's y: keys, values.
template <class T, class C, int Width>
__global__ void __launch_bounds__(kThreads) write(KvCacheWriteParams p) {
  if (blockIdx.y == 0)
    write_side<T, C, Width>(p, p.k);
  else
    write_side<T, C, Width>(p, p.v);
}

template <class T, class C>
bool side_fits(const CacheSide& side) {
  constexpr int64_t kWide = kWidth<T, C>;
  if (side.head_dim == 0) return true;
  bool fit = reinterpret_cast<uintptr_t>(side.source) % 16 == 0 && reinterpret_cast<uintptr_t>(side.cache) % 16 == 0 &&
             side.head_dim % kWide == 0;
  for (const int64_t stride : side.source_strides) fit = fit && stride % kVector<T> == 0;
  for (const int64_t stride : side.cache_strides) fit = fit && stride % kVector<C> == 0;
  return fit;
}

template <class T, class C>
Status start(const KvCacheWriteParams& p, const Device& device) {
  constexpr int64_t kRows = kThreads / kTeam;
  // A multiprocessor runs up to 8 CTAs at once; several times as many even out who ends when.
  const int64_t ctas = (p.tokens * p.kv_heads + kRows - 1) / kRows, most = 32 * int64_t{device.multiprocessors};
  const auto kernel = side_fits<T, C>(p.k) && side_fits<T, C>(p.v) ? write<T, C, kWidth<T, C>> : write<T, C, 1>;
  return launch(kernel, {ctas < most ? ctas : most, p.v.head_dim > 0 ? 2 : 1}, kThreads, 0, device, p);
}

template <class T>
Status with_cache_dtype(const KvCacheWriteParams& p, const Device& device) {
  if (p.cache_dtype == DType::i8) return start<T, int8_t>(p, device);
  if (p.cache_dtype == DType::f8) return start<T, f8>(p, device);
  LLMCORE_DISPATCH_FLOAT(p.cache_dtype, C, return (start<T, C>(p, device)))
  return "unknown dtype of the cache";
}

}  // namespace

Status kv_cache_write(const KvCacheWriteParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (with_cache_dtype<T>(p, device)))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
