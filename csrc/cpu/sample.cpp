#include "llmcore/sample.h"

#include "llmcore/sampling_math.h"
#include "scratch.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

using sampling::Cut;
using sampling::Scalar;

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int64_t kFewEntries = 32;  // from here on sorting beats another histogram

// sampling_math.h on vectors.
struct Lanes {
  using F = vf;
  using I = vi;
  using U = vu;
  static LLMCORE_INLINE F set(float x) { return set1(x); }
  // Fused on every instruction set, where simd.h's is free not to be.
  static LLMCORE_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_fmadd_ps(0xffff, (__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__) && !defined(LLMCORE_EMULATE_AVX512BF16)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#endif
  }
  static LLMCORE_INLINE U bits(F x) { return bit_cast<U>(x); }
  static LLMCORE_INLINE F from_bits(U x) { return bit_cast<F>(x); }
  static LLMCORE_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
  static LLMCORE_INLINE I floor_log2(U x) {
    x &= ~(x >> 1);  // no two leading ones: the conversion does not round up to the next power of 2
    return (I)(bits(__builtin_convertvector(x, F)) >> 23) - 127;
  }
};

template <class T>
LLMCORE_INLINE vf load_logits(const T* p, int64_t n) {  // what is beyond reads as -inf
  const vf x = load_n(p, n);
  return n >= kLanes ? x : iota() < static_cast<int32_t>(n) ? x : set1(-__builtin_inff());
}

// An element's place in the order of the likeliest, as one number: larger comes first.
LLMCORE_INLINE uint64_t entry_of(uint32_t key, uint32_t index) { return static_cast<uint64_t>(key) << 32 | ~index; }
LLMCORE_INLINE Cut cut_at(uint64_t entry) {
  return {static_cast<uint32_t>(entry >> 32), ~static_cast<uint32_t>(entry)};
}

// How much an element adds to the sum that a filter looks at, by its key: one, or its probability.
struct Count {
  uint64_t needed;
  uint64_t of(uint32_t) const { return 1; }
  uint64_t target(uint64_t) const { return needed; }
};
struct Mass {
  float top_p, max, inverse_temperature;
  uint64_t of(uint32_t key) const {
    const float x = sampling::from_ordered(key);
    return sampling::fixed_point(sampling::exp_nonpositive<Scalar>((x - max) * inverse_temperature));
  }
  uint64_t target(uint64_t total) const { return sampling::share_of(top_p, total); }
};

// The bin, from the largest down, with which the sums reach `needed`, which becomes what that bin must give.
LLMCORE_INLINE int crossing_bin(const uint64_t* sums, uint64_t& needed) {
  int bin = kBins - 1;
  while (bin > 0 && sums[bin] < needed) needed -= sums[bin--];
  return bin;
}

LLMCORE_INLINE void sort_descending(uint64_t* entries, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t entry = entries[i];
    int64_t j = i;
    for (; j > 0 && entries[j - 1] < entry; --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
}

// Of the entries, which are overwritten: the one with which the sum over it and all larger ones reaches `needed`.
// `shift`: the bits from there on are the same in all.
template <class Measure>
uint64_t crossing_entry(uint64_t* entries, int64_t n, int shift, uint64_t needed, const Measure& measure,
                        uint64_t* sums) {
  while (n > kFewEntries) {
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
    __builtin_memset(sums, 0, kBins * sizeof *sums);
    for (int64_t i = 0; i < n; ++i)
      sums[entries[i] >> shift & (kBins - 1)] += measure.of(static_cast<uint32_t>(entries[i] >> 32));
    const uint64_t bin = crossing_bin(sums, needed);
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i)
      if ((entries[i] >> shift & (kBins - 1)) == bin) entries[left++] = entries[i];
    n = left;
  }
  sort_descending(entries, n);
  int64_t i = 0;
  for (uint64_t sum = 0; i < n - 1; ++i) {
    sum += measure.of(static_cast<uint32_t>(entries[i] >> 32));
    if (sum >= needed) break;
  }
  return entries[i];
}

template <class T>
class RowSampler {
 public:
  // scratch: `vocab` entries and kBins sums
  RowSampler(const SampleParams& p, int64_t row, uint64_t* entries, uint64_t* sums)
      : p_(p),
        row_(row),
        x_(static_cast<const T*>(p.logits) + row * p.logits_stride),
        vocab_(p.vocab),
        entries_(entries),
        sums_(sums) {}

  void run() {
    find_max();
    if (bad_) {
      p_.tokens[row_] = -1;
      p_.logprobs[row_] = __builtin_nanf("");
      return;
    }
    const float temperature = p_.temperature[row_];
    greedy_ = temperature < sampling::kGreedyTemperature;
    inverse_temperature_ = greedy_ ? 0.f : 1.f / temperature;
    if (!greedy_) {
      const int64_t top_k = p_.top_k[row_];
      if (top_k >= 1 && top_k < vocab_) cut_ = select(Count{static_cast<uint64_t>(top_k)});
      if (p_.top_p[row_] < 1.f) cut_ = select(Mass{p_.top_p[row_], max_, inverse_temperature_});
    }
    const uint32_t token = winner();
    p_.tokens[row_] = token;
    p_.logprobs[row_] = sampling::log_probability(to_float(x_[token]), max_, sum());
  }

 private:
  void find_max() {
    vf best = set1(-__builtin_inff());
    vi nan = {};
    for_row(vocab_, [&](int64_t i, auto n) {
      const vf x = load_logits(x_ + i, n);
      best = max(x, best);
      nan |= x != x;
    });
    max_ = reduce_max(best) + 0.f;
    bad_ = !(max_ - max_ == 0.f);  // infinite
    for (int i = 0; i < kLanes; ++i) bad_ |= nan[i] != 0;
  }

  // f(first index, keys[kLanes], how many of them)
  template <class F>
  void for_keys(const F& f) const {
    for_row(vocab_, [&](int64_t i, auto n) {
      const vu keys = sampling::ordered<Lanes>(load_logits(x_ + i, n));
      uint32_t buffer[kLanes];
      __builtin_memcpy(buffer, &keys, sizeof buffer);
      f(static_cast<uint32_t>(i), buffer, static_cast<int>(int64_t{n}));
    });
  }

  // What is left of the tokens of cut_ after a filter that keeps the likeliest of them until their sum is reached.
  template <class Measure>
  Cut select(const Measure& measure) {
    constexpr int kShift = 32 - kDigitBits;
    __builtin_memset(sums_, 0, kBins * sizeof *sums_);
    add_to_bins(measure, kShift);
    uint64_t total = 0;
    for (int bin = 0; bin < kBins; ++bin) total += sums_[bin];
    uint64_t needed = measure.target(total);
    const uint32_t bin = crossing_bin(sums_, needed);
    int64_t n = 0;
    for_keys([&](uint32_t first, const uint32_t* keys, int count) {
      for (int j = 0; j < count; ++j)
        if (keys[j] >> kShift == bin && sampling::kept(cut_, keys[j], first + j))
          entries_[n++] = entry_of(keys[j], first + j);
    });
    return cut_at(crossing_entry(entries_, n, 32 + kShift, needed, measure, sums_));
  }

  void add_to_bins(const Count&, int shift) {
    for_keys([&](uint32_t first, const uint32_t* keys, int count) {
      for (int j = 0; j < count; ++j) sums_[keys[j] >> shift] += sampling::kept(cut_, keys[j], first + j);
    });
  }
  void add_to_bins(const Mass&, int shift) {
    for_keys([&](uint32_t first, const uint32_t* keys, int count) {
      float e[kLanes];
      store(e, exp_scaled(first, count));
      for (int j = 0; j < count; ++j)
        if (sampling::kept(cut_, keys[j], first + j)) sums_[keys[j] >> shift] += sampling::fixed_point(e[j]);
    });
  }

  LLMCORE_INLINE vf exp_scaled(int64_t i, int64_t n) const {
    return sampling::exp_nonpositive<Lanes>((load_logits(x_ + i, n) - max_) * inverse_temperature_);
  }

  // The token of the smallest entry in the race; when greedy, of the first of the largest logits.
  uint32_t winner() const {
    uint64_t best = sampling::kNoEntry;
    const vu cut_key = cut_.key - vu{}, cut_index = cut_.index - vu{};
    for_row(vocab_, [&](int64_t i, auto n) {
      const vf x = load_logits(x_ + i, n), e = exp_scaled(i, n);
      const vu key = sampling::ordered<Lanes>(x), index = static_cast<uint32_t>(i) + (vu)iota();
      const vi in_cut = (vi)(key > cut_key) | ((vi)(key == cut_key) & (vi)(index <= cut_index));
      const vi keep = greedy_ ? (vi)(x == max_) : in_cut & (vi)(e > 0.f) & (vi)(e >= p_.min_p[row_]);
      int32_t keeps[kLanes], any = 0;
      __builtin_memcpy(keeps, &keep, sizeof keeps);
      for (int j = 0; j < kLanes; ++j) any |= keeps[j];
      if (!any) return;
      float times[kLanes];
      store(times, greedy_ ? zero() : sampling::exponential<Lanes>(random(i)) / e);
      for (int j = 0; j < kLanes; ++j) {
        const uint64_t entry = sampling::race_entry(times[j], static_cast<uint32_t>(i) + j);
        if (keeps[j] && entry < best) best = entry;
      }
    });
    return static_cast<uint32_t>(best);
  }

  LLMCORE_INLINE vu random(int64_t i) const {
    static_assert(kLanes % 4 == 0, "a call of philox() serves four tokens");
    vu r;
    for (int j = 0; j < kLanes; j += 4) {
      const sampling::Random4 four =
          sampling::philox(static_cast<uint64_t>(p_.seeds[row_]), static_cast<uint64_t>(p_.positions[row_]),
                           static_cast<uint32_t>((i + j) / 4));
      for (int k = 0; k < 4; ++k) r[j + k] = four.x[k];
    }
    return r;
  }

  // The fixed-point sum of e^(x - max): 40 bits in two halves, each summed in 32 bits for as long as that is safe.
  uint64_t sum() const {
    constexpr int64_t kSafe = 1024 * kLanes;
    uint64_t total = 0;
    for (int64_t begin = 0; begin < vocab_; begin += kSafe) {
      vi high = {}, low = {};
      for_row(vocab_ - begin < kSafe ? vocab_ - begin : kSafe, [&](int64_t i, auto n) {
        const vf e = sampling::exp_nonpositive<Lanes>(load_logits(x_ + begin + i, n) - max_) * 1048576.f;
        const vi whole = __builtin_convertvector(e, vi);
        high += whole;
        low += __builtin_convertvector((e - __builtin_convertvector(whole, vf)) * 1048576.f, vi);
      });
      for (int j = 0; j < kLanes; ++j)
        total += (static_cast<uint64_t>(static_cast<uint32_t>(high[j])) << 20) + static_cast<uint32_t>(low[j]);
    }
    return total;
  }

  const SampleParams& p_;
  const int64_t row_;
  const T* const x_;
  const int64_t vocab_;
  uint64_t *const entries_, *const sums_;
  float max_ = 0.f, inverse_temperature_ = 0.f;
  bool bad_ = false, greedy_ = false;
  Cut cut_ = sampling::kKeepAll;
};

template <class T>
void sample_rows(const SampleParams& p, const Parallel& par) {
  const int64_t workers = p.rows < par.threads ? p.rows : par.threads, each = p.vocab + kBins;
  const Scratch<uint64_t> scratch(workers * each);
  parallel_tasks(par, p.rows, [&](int64_t row, int64_t worker) {
    uint64_t* mine = scratch.data() + worker * each;
    RowSampler<T>(p, row, mine + kBins, mine).run();
  });
}

// A seen token is met once for each time it was seen; its counts are taken, and cleared, the first time.
template <class T>
void penalise_rows(const ApplyPenaltiesParams& p, const Parallel& par) {
  struct Counts {
    uint32_t prompt, output;
  };
  parallel_ranges(par, p.rows, row_grain(p.vocab + p.max_len), [&](int64_t begin, int64_t end) {
    const Scratch<Counts> scratch(p.vocab);
    Counts* counts = scratch.data();
    __builtin_memset(counts, 0, p.vocab * sizeof *counts);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* tokens = p.tokens + row * p.max_len;
      T* x = static_cast<T*>(p.logits) + row * p.logits_stride;
      const auto for_tokens = [&](const auto& f) {
        for (int64_t i = 0; i < p.max_len; ++i)
          if (tokens[i] >= 0 && tokens[i] < p.vocab) f(i, tokens[i]);
      };
      for_tokens([&](int64_t i, int64_t t) { ++(i < p.prompt_lens[row] ? counts[t].prompt : counts[t].output); });
      for_tokens([&](int64_t, int64_t t) {
        if (counts[t].prompt + counts[t].output == 0) return;
        x[t] = from_float<T>(sampling::penalised(to_float(x[t]), counts[t].output, p.repetition[row], p.presence[row],
                                                 p.frequency[row]));
        counts[t] = {0, 0};
      });
    }
  });
}

}  // namespace

void sample(const SampleParams& p, const Parallel& par) { LLMCORE_DISPATCH_FLOAT(p.dtype, T, sample_rows<T>(p, par)) }

void apply_penalties(const ApplyPenaltiesParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, penalise_rows<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
