// Drawing tokens from logits. A CTA takes a row and goes through it several times (from the L2 cache after the first):
// for its largest logit, for each 8-bit digit of the thresholds of top-k and top-p, and for the draw. Nothing is
// sorted. What the result depends on are integers - counts, fixed-point sums, keys - so the order of additions does not
// matter.
#include "llmcore/sample.h"

#include "launch.cuh"
#include "llmcore/sampling_math.h"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

using sampling::Cut;
using sampling::Scalar;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 4;  // accesses of 16 bytes that a thread has in flight
constexpr int kBins = 256, kBinsPerLane = kBins / 32;

// Each lane adds to bins of its own, which lie in a bank of its own: logits crowd into a few bins.
struct Histogram {
  uint32_t low[kBins * 32], high[kBins * 32];  // of 64-bit sums
  uint64_t sums[kBins];
  uint64_t per_warp[kWarps];
  uint64_t needed, in_bin;  // what `find_bin` found
  uint32_t bin;
};

// Keys keep the bits in which values of T can differ, in whole digits.
template <class T>
constexpr int kDigits = 4;
template <>
constexpr int kDigits<bf16> = 2;
template <>
constexpr int kDigits<f16> = 3;
template <class T>
constexpr int kDropped = 32 - 8 * kDigits<T>;

template <class T>
PTX_DEVICE uint32_t key_of(float x) {
  return sampling::ordered<Scalar>(x) >> kDropped<T>;
}
template <class T>
PTX_DEVICE float value_of(uint32_t key) {  // the bits dropped from a negative number's key were ones
  const uint32_t whole = key << kDropped<T>;
  return sampling::from_ordered(whole & 0x80000000u ? whole : whole | ((1u << kDropped<T>)-1u));
}

PTX_DEVICE uint64_t shfl(uint64_t x, int from_lane) {
  const uint32_t high = ptx::shfl(static_cast<uint32_t>(x >> 32), from_lane);
  return static_cast<uint64_t>(high) << 32 | ptx::shfl(static_cast<uint32_t>(x), from_lane);
}

struct Min {
  PTX_DEVICE uint64_t of(uint64_t x, uint64_t y) { return x < y ? x : y; }
};
struct Max {
  PTX_DEVICE uint64_t of(uint64_t x, uint64_t y) { return x > y ? x : y; }
};
struct Sum {
  PTX_DEVICE uint64_t of(uint64_t x, uint64_t y) { return x + y; }
};

// Over the CTA, for every thread.
template <class Op>
PTX_DEVICE uint64_t reduce(uint64_t x, uint64_t* per_warp) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = Op::of(x, shfl(x, lane ^ mask));
  ptx::syncthreads();  // the last call has been read
  if (lane == 0) per_warp[thread / 32] = x;
  ptx::syncthreads();
  x = per_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = Op::of(x, per_warp[warp]);
  return x;
}

// A row of logits, read in chunks of Width elements.
template <class T, int Width>
struct Row {
  const T* x;
  int vocab;

  // f(index of the first, values) for the chunks that hold [begin, end), shared out over the CTA
  template <class F>
  __device__ __forceinline__ void chunks(int begin, int end, const F& f) const {
    const int last = (end + Width - 1) / Width;
#pragma unroll 1
    for (int at = begin / Width + static_cast<int>(threadIdx.x); at < last; at += kAhead * kThreads) {
      Packed<T, Width> ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (at + i * kThreads < last) ahead[i] = fetch<Width>(x + int64_t{at + i * kThreads} * Width);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at + i * kThreads >= last) continue;
        float values[Width];
        unpack(ahead[i], values);
        f((at + i * kThreads) * Width, values);
      }
    }
  }
  // f(index, value) for [begin, end)
  template <class F>
  __device__ __forceinline__ void elements(int begin, int end, const F& f) const {
    chunks(begin, end, [&](int first, const float(&values)[Width]) {
#pragma unroll
      for (int i = 0; i < Width; ++i)
        if (first + i >= begin && first + i < end) f(first + i, values[i]);
    });
  }
};

PTX_DEVICE void clear(Histogram& h, bool high) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins * 32; i += kThreads) {
    h.low[i] = 0;
    if (high) h.high[i] = 0;
  }
  ptx::syncthreads();
}

PTX_DEVICE void add(Histogram& h, uint32_t bin, uint64_t x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t low = static_cast<uint32_t>(x), before = ptx::shared_add(&h.low[bin * 32 + lane], low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (before + low < before ? 1 : 0);
  if (high > 0) ptx::shared_add(&h.high[bin * 32 + lane], high);
}

// The bin, from the largest down, with which the sums reach target(their total). h.needed: what that bin must give.
template <class Target>
PTX_DEVICE void find_bin(Histogram& h, bool high, const Target& target) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  ptx::syncthreads();
  if (thread < kBins) {
    uint64_t sum = 0;
    for (int i = 0; i < 32; ++i) {  // each lane begins in a bank of its own
      const int at = thread * 32 + (thread + i) % 32;
      sum += h.low[at];
      if (high) sum += static_cast<uint64_t>(h.high[at]) << 32;
    }
    h.sums[thread] = sum;
  }
  ptx::syncthreads();
  if (thread < 32) {
    uint64_t mine = 0;
    for (int i = 0; i < kBinsPerLane; ++i) mine += h.sums[lane * kBinsPerLane + i];
    uint64_t from_here = mine;  // the sum of this lane's bins and all larger ones
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = shfl(from_here, (lane + step) % 32);
      if (lane + step < 32) from_here += other;
    }
    uint64_t needed = target(shfl(from_here, 0));
    if (needed <= from_here && needed > from_here - mine) {
      needed -= from_here - mine;
      int bin = lane * kBinsPerLane + kBinsPerLane - 1;
      while (h.sums[bin] < needed) needed -= h.sums[bin--];
      h.bin = static_cast<uint32_t>(bin);
      h.needed = needed;
      h.in_bin = h.sums[bin];
    }
  }
  ptx::syncthreads();
}

// The index of the `rank`th (from 1 on) of the elements with this key.
template <class T, int Width>
PTX_DEVICE uint32_t index_of_rank(const Row<T, Width>& row, uint32_t key, uint64_t rank, Histogram& h) {
  int begin = 0, end = row.vocab, shift = 0;
  while (row.vocab > kBins << shift) shift += 8;
  for (;; shift -= 8) {
    clear(h, false);
    row.elements(begin, end, [&](int index, float x) {
      if (key_of<T>(x) == key) add(h, kBins - 1 - (static_cast<uint32_t>(index - begin) >> shift), 1);
    });
    find_bin(h, false, [&](uint64_t) { return rank; });
    rank = h.needed;
    begin += (kBins - 1 - static_cast<int>(h.bin)) << shift;
    if (shift == 0) return static_cast<uint32_t>(begin);
    const int after = begin + (1 << shift);
    end = after < end ? after : end;
  }
}

// How much an element adds to the sum that a filter looks at: one, or its probability.
struct Count {
  static constexpr bool kHigh = false;
  uint64_t needed;
  __device__ uint64_t of(float) const { return 1; }
  __device__ uint64_t target(uint64_t) const { return needed; }
};
struct Mass {
  static constexpr bool kHigh = true;
  float top_p, max, inverse_temperature;
  __device__ uint64_t of(float x) const {
    return sampling::fixed_point(sampling::exp_nonpositive<Scalar>((x - max) * inverse_temperature));
  }
  __device__ uint64_t target(uint64_t total) const { return sampling::share_of(top_p, total); }
};

// What is left of the tokens of a cut after a filter that keeps the likeliest of them until their sum is reached.
template <class T, int Width, class Measure>
__device__ Cut select(const Row<T, Width>& row, const Cut& cut, const Measure& measure, Histogram& h) {
  uint32_t prefix = 0;
  uint64_t needed = 0;
#pragma unroll 1
  for (int digit = 0; digit < kDigits<T>; ++digit) {
    const int shift = 8 * (kDigits<T> - 1 - digit);
    clear(h, Measure::kHigh);
    row.elements(0, row.vocab, [&](int index, float x) {
      const uint32_t key = key_of<T>(x);
      if (key >> shift >> 8 != prefix || !sampling::kept(cut, key, static_cast<uint32_t>(index))) return;
      if (const uint64_t share = measure.of(x)) add(h, key >> shift & (kBins - 1), share);
    });
    find_bin(h, Measure::kHigh, [&](uint64_t total) { return digit == 0 ? measure.target(total) : needed; });
    needed = h.needed;
    prefix = prefix << 8 | h.bin;
  }
  const uint64_t each = measure.of(value_of<T>(prefix)), rank = (needed + each - 1) / each;
  if (rank * each == h.in_bin) return {prefix, prefix == cut.key ? cut.index : 0xffffffffu};
  return {prefix, index_of_rank(row, prefix, rank, h)};
}

// The entry of the row's first token in the race, kNoEntry where there is none. Greedy: of the first largest logit.
template <class T, int Width>
__device__ uint64_t winner(const SampleParams& p, const Row<T, Width>& row, const Cut& cut, float max,
                           float inverse_temperature, uint64_t& total) {
  const int64_t r = blockIdx.x;
  const uint64_t seed = static_cast<uint64_t>(p.seeds[r]), position = static_cast<uint64_t>(p.positions[r]);
  const float min_p = p.min_p[r];
  const bool greedy = inverse_temperature == 0.f;
  uint64_t best = sampling::kNoEntry;
  row.chunks(0, row.vocab, [&](int first, const float(&values)[Width]) {
    constexpr int kGroup = Width < 4 ? Width : 4;  // tokens that share a call of philox
#pragma unroll
    for (int group = 0; group < Width; group += kGroup) {
      float e[kGroup];
      bool any = false;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float x = values[group + i];
        const uint32_t index = static_cast<uint32_t>(first + group + i);
        total += sampling::fixed_point(sampling::exp_nonpositive<Scalar>(x - max));
        e[i] = 0.f;
        if (greedy) {
          if (x == max && index < best) best = index;
        } else if (sampling::kept(cut, key_of<T>(x), index)) {
          const float share = sampling::exp_nonpositive<Scalar>((x - max) * inverse_temperature);
          if (share >= min_p) e[i] = share;
        }
        any = any || e[i] > 0.f;
      }
      if (!any) continue;
      const sampling::Random4 random = sampling::philox(seed, position, static_cast<uint32_t>(first + group) / 4);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t index = static_cast<uint32_t>(first + group + i);
        const uint32_t word = kGroup == 4      ? random.x[i]
                              : index % 4 == 0 ? random.x[0]
                              : index % 4 == 1 ? random.x[1]
                              : index % 4 == 2 ? random.x[2]
                                               : random.x[3];
        if (!(e[i] > 0.f)) continue;
        const uint64_t entry = sampling::race_entry(sampling::exponential<Scalar>(word) / e[i], index);
        best = entry < best ? entry : best;
      }
    }
  });
  return best;
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 1) sample_row(SampleParams p) {
  PTX_SHARED_MEMORY(shared);
  Histogram& h = *reinterpret_cast<Histogram*>(shared);
  const int64_t r = blockIdx.x;
  const Row<T, Width> row{static_cast<const T*>(p.logits) + r * p.logits_stride, static_cast<int>(p.vocab)};

  uint32_t top = 0;
  row.elements(0, row.vocab, [&](int, float x) {
    const uint32_t key = x == x ? sampling::ordered<Scalar>(x) : 0xffffffffu;
    top = key > top ? key : top;
  });
  top = static_cast<uint32_t>(reduce<Max>(top, h.per_warp));
  uint64_t best = sampling::kNoEntry, total = 0;
  float max = 0.f;
  if (top > sampling::kOrderedMinusInf && top < sampling::kOrderedInf) {
    max = sampling::from_ordered(top);
    const float temperature = p.temperature[r], top_p = p.top_p[r];
    const bool greedy = !(temperature >= sampling::kGreedyTemperature);
    const float inverse_temperature = greedy ? 0.f : 1.f / temperature;
    Cut cut = sampling::kKeepAll;
    if (!greedy) {
      const int64_t top_k = p.top_k[r];
      if (top_k >= 1 && top_k < p.vocab) cut = select(row, cut, Count{static_cast<uint64_t>(top_k)}, h);
      if (top_p < 1.f) cut = select(row, cut, Mass{top_p, max, inverse_temperature}, h);
    }
    best = reduce<Min>(winner(p, row, cut, max, inverse_temperature, total), h.per_warp);
    total = reduce<Sum>(total, h.per_warp);
  }
  if (threadIdx.x > 0) return;
  const bool found = best != sampling::kNoEntry;
  const uint32_t token = static_cast<uint32_t>(best);
  p.tokens[r] = found ? static_cast<int64_t>(token) : -1;
  p.logprobs[r] = found ? sampling::log_probability(to_float(row.x[token]), max, total) : ptx::from_bits(0x7fc00000);
}

template <class T>
Status start(const SampleParams& p, const Device& device) {
  const auto kernel = vectors_fit<T>(p.logits, p.rows > 1 ? p.logits_stride : 0, p.vocab) ? sample_row<T, kVector<T>>
                                                                                          : sample_row<T, 1>;
  return launch(kernel, {p.rows}, kThreads, sizeof(Histogram), device, p);
}

}  // namespace

Status sample(const SampleParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (start<T>(p, device)))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
