// Attention of few rows, bound by the memory that the keys and values come from.
//
// A task is a range of keys of one sequence together with all its KV heads (or some of them, when there are few tasks).
// In a cache the heads of a token lie side by side. So the task goes through memory in order, a few tokens at a time
// and all heads of those tokens before the next: first the keys of a tile, whose scores it keeps, then their softmax,
// then the values. Keys and values are read once, in place, for all rows of their KV head; 8-bit and 16-bit elements
// are widened in registers, or multiplied as bf16 pairs.
//
// Scores are dot products along the rows of the cache. They are formed kLanes at a time, R rows times kLanes / R keys,
// so that the sums across lanes cost one transposing reduction for all of them.
//
// Long sequences are cut into ranges by their own length alone, and the ranges are joined in order: a sequence's result
// has the same bits whatever else is in the batch and however many threads there are.
#include "attention_decode.h"

#include <type_traits>

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kTile = 64;             // keys whose scores are kept
constexpr int64_t kSpanBytes = 16 << 10;  // of keys (or values) that are read before the next head's turn comes again
constexpr int64_t kMinRange = 512;        // keys: the partial result of a range is some 2 % of what it reads then
constexpr int64_t kMaxRanges = 16;        // of a sequence
constexpr int kMaxRowBlock = kLanes / 4;
static_assert(kTile % kPanel == 0, "tile size");

// Elements are widened to float.
template <class T>
struct FloatMath {
  using Elem = T;
  using Query = float;
  static constexpr int kWidth = kLanes;  // elements that a step of a dot product takes
  static constexpr int kKeysAtOnce = 1;  // keys that a step of the sum of values takes
  using Weight = float;                  // of kKeysAtOnce keys
  using Vector = vf;
  static LLMCORE_INLINE vf query(const float* q) { return load(q); }
  static LLMCORE_INLINE vf key(const T* k) { return load(k); }
  static LLMCORE_INLINE vf key(const T* k, int64_t n) { return load_n(k, n); }
  static LLMCORE_INLINE vf dot(vf acc, vf q, vf k) { return fma(q, k, acc); }
  static LLMCORE_INLINE vf value(const T* const* v, int64_t at) { return load(v[0] + at); }
  static LLMCORE_INLINE void values(const T* const* v, int64_t at, vf& a, vf& b) {
    a = load(v[0] + at), b = load(v[0] + at + kLanes);
  }
  static LLMCORE_INLINE vf value(const T* const* v, int64_t at, int64_t n) { return load_n(v[0] + at, n); }
  static LLMCORE_INLINE vf weigh(vf acc, float w, vf v) { return fma(set1(w), v, acc); }
};

// Pairs of bf16: of neighbours along a key's row, and of one feature of two neighbouring values. Head sizes are
// multiples of 2 kLanes.
struct Bf16Math {
  using Elem = bf16;
  using Query = bf16;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kKeysAtOnce = 2;
  using Weight = uint32_t;
  using Vector = vu;
  static LLMCORE_INLINE vu pairs(const bf16* p) {
    vu v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static LLMCORE_INLINE vu query(const bf16* q) { return pairs(q); }
  static LLMCORE_INLINE vu key(const bf16* k) { return pairs(k); }
  static LLMCORE_INLINE vu key(const bf16* k, int64_t) { return pairs(k); }  // not called
  static LLMCORE_INLINE vf dot(vf acc, vu q, vu k) { return dot_bf16(acc, q, k); }
  static LLMCORE_INLINE void values(const bf16* const* v, int64_t at, vu& a, vu& b) {
    pair_up(v[0] + at, v[1] + at, a, b);
  }
  static LLMCORE_INLINE vu value(const bf16* const* v, int64_t at) {
    vh even, odd;
    __builtin_memcpy(&even, v[0] + at, sizeof(even));
    __builtin_memcpy(&odd, v[1] + at, sizeof(odd));
    return __builtin_convertvector(even, vu) | __builtin_convertvector(odd, vu) << 16;
  }
  static LLMCORE_INLINE vu value(const bf16* const* v, int64_t at, int64_t) { return value(v, at); }  // not called
  static LLMCORE_INLINE vf weigh(vf acc, uint32_t w, vu v) { return dot_bf16(acc, w - vu{}, v); }
};

// Keys or values by their rows in the cache: element `at` of key j is row[j][at]. While a row is read, the row `ahead`
// keys later is asked for, up to the last of `rows`.
template <class T>
struct Rows {
  const T* const* row;
  int64_t ahead;
  LLMCORE_INLINE void ask(int64_t j, int64_t at) const { __builtin_prefetch(row[j + ahead] + at, 0, 3); }
};

// s[r][j] = q[r] . k[j] for R rows and kLanes / R keys. Elements of a key's head begin at `at`.
template <class Math, int R>
LLMCORE_INLINE void dot_block(const typename Math::Query* q, int64_t q_stride, const Rows<typename Math::Elem>& k,
                              int64_t key, int64_t at, int64_t dim, float* s) {
  constexpr int kKeysHere = kLanes / R;
  vf acc[kLanes];
  for (int i = 0; i < kLanes; ++i) acc[i] = zero();
  int64_t d = 0;
  for (; d + Math::kWidth <= dim; d += Math::kWidth) {
    typename Math::Vector rows[R];
    for (int r = 0; r < R; ++r) rows[r] = Math::query(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int j = 0; j < kKeysHere; ++j) {
      k.ask(key + j, at + d);
      const auto x = Math::key(k.row[key + j] + at + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * kKeysHere + j] = Math::dot(acc[r * kKeysHere + j], rows[r], x);
    }
  }
  if (d < dim)
    for (int j = 0; j < kKeysHere; ++j) {
      const auto x = Math::key(k.row[key + j] + at + d, dim - d);
      for (int r = 0; r < R; ++r)
        acc[r * kKeysHere + j] = Math::dot(acc[r * kKeysHere + j], Math::query(q + r * q_stride + d), x);
    }
  float sums[kLanes];
  store(sums, sum_each(acc));
  for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * kTile, sums + r * kKeysHere, kKeysHere * sizeof(float));
}

// acc[r] += sum over keys of weights[r][key] * v[key], for R rows and `Vectors` vectors of features from d on.
template <class Math, int R, int Vectors>
LLMCORE_INLINE void weigh_block(const typename Math::Weight* w, const Rows<typename Math::Elem>& v, int64_t key,
                                int64_t count, int64_t at, int64_t d, float* acc, int64_t acc_stride) {
  constexpr int64_t kStride = kTile / Math::kKeysAtOnce;
  constexpr int64_t kBytes = Vectors * kLanes * sizeof(typename Math::Elem);
  vf sum[R][Vectors];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) sum[r][j] = load(acc + r * acc_stride + d + j * kLanes);
  for (int64_t i = key; i < key + count; i += Math::kKeysAtOnce) {
    for (int j = 0; j < Math::kKeysAtOnce; ++j)
      for (int64_t byte = 0; byte < kBytes; byte += 64)
        v.ask(i + j, at + d + byte / static_cast<int64_t>(sizeof(typename Math::Elem)));
    typename Math::Vector value[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j + 2 <= Vectors; j += 2) Math::values(v.row + i, at + d + j * kLanes, value[j], value[j + 1]);
    if (Vectors % 2) value[Vectors - 1] = Math::value(v.row + i, at + d + (Vectors - 1) * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j)
        sum[r][j] = Math::weigh(sum[r][j], w[r * kStride + i / Math::kKeysAtOnce], value[j]);
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) store(acc + r * acc_stride + d + j * kLanes, sum[r][j]);
}

// R rows of one KV head, keys [key, key + count) of a tile.
template <class Math, int R>
struct RowBlock {
  using Elem = typename Math::Elem;

  // Features outside, rows inside: a piece of the values is read from memory once.
  static LLMCORE_NOINLINE void weigh(int64_t rows, const typename Math::Weight* w, const Rows<Elem>& v, int64_t key,
                                     int64_t count, int64_t at, int64_t dim, float* acc, int64_t acc_stride) {
    constexpr int64_t kStride = kTile / Math::kKeysAtOnce;
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
      for (int64_t r = 0; r < rows; r += R)
        weigh_block<Math, R, 4>(w + r * kStride, v, key, count, at, d, acc + r * acc_stride, acc_stride);
    for (; d + kLanes <= dim; d += kLanes)
      for (int64_t r = 0; r < rows; r += R)
        weigh_block<Math, R, 1>(w + r * kStride, v, key, count, at, d, acc + r * acc_stride, acc_stride);
    if (d == dim) return;
    for (int64_t r = 0; r < rows; ++r) {
      vf sum = load(acc + r * acc_stride + d);
      for (int64_t i = key; i < key + count; i += Math::kKeysAtOnce)
        sum = Math::weigh(sum, w[r * kStride + i / Math::kKeysAtOnce], Math::value(v.row + i, at + d, dim - d));
      store(acc + r * acc_stride + d, sum);
    }
  }

  static LLMCORE_NOINLINE void dots(int64_t rows, const typename Math::Query* q, int64_t q_stride, const Rows<Elem>& k,
                                    int64_t key, int64_t count, int64_t at, int64_t dim, float* s) {
    for (int64_t j = key; j < key + count; j += kLanes / R)
      for (int64_t r = 0; r < rows; r += R)
        dot_block<Math, R>(q + r * q_stride, q_stride, k, j, at, dim, s + r * kTile + j);
  }
};

// f(constant R) with the block of rows that suits `rows`: 1, 2 or 4. The last block may reach beyond them.
template <class F>
LLMCORE_INLINE void with_row_block(int64_t rows, const F& f) {
  constexpr int kTwo = kMaxRowBlock >= 2 ? 2 : 1, kFour = kMaxRowBlock >= 4 ? 4 : kTwo;
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if (rows == 2) return f(std::integral_constant<int, kTwo>{});
  f(std::integral_constant<int, kFour>{});
}
LLMCORE_INLINE int64_t keys_per_block(int64_t rows) {
  return kLanes / (rows >= 3 ? kMaxRowBlock : min64(rows, kMaxRowBlock));
}

template <class Math>
class Decode {
  using Elem = typename Math::Elem;
  using Query = typename Math::Query;

 public:
  Decode(const AttentionParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        group_(p.shape.heads / p.shape.kv_heads),
        width_(round_up(p.shape.v_head_dim, kLanes)),
        q_stride_(round_up(p.shape.head_dim, Math::kWidth)),
        first_task_(p.shape.batch + 1),
        first_part_(p.shape.batch + 1) {
    first_task_.data()[0] = first_part_.data()[0] = 0;
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      const Sequence seq = sequence(p.shape, b);
      const int64_t ranges = decodes(p.shape, seq) && seq.num_q > 0 ? this->ranges(seq) : 0;
      if (ranges) max_rows_ = max64(max_rows_, seq.num_q * group_);
      first_task_.data()[b + 1] = first_task_.data()[b] + ranges;
      first_part_.data()[b + 1] = first_part_.data()[b] + (ranges > 1 ? ranges : 0);
    }
    part_size_ = padded(max_rows_) * (width_ + kLanes) + round_up(max_rows_, kLanes);
  }

  void run() {
    const int64_t tasks = first_task_.data()[p_.shape.batch], kv_heads = p_.shape.kv_heads;
    if (tasks == 0) return;
    // Heads are divided only where there would be fewer than two tasks for each thread.
    const int64_t divisions = min64(kv_heads, max64(1, (2 * par_.threads + tasks - 1) / tasks));
    Scratch<float> parts(first_part_.data()[p_.shape.batch] * kv_heads * part_size_);
    Scratch<Worker*> workers(par_.threads);
    for (int i = 0; i < par_.threads; ++i) workers.data()[i] = nullptr;
    parallel_tasks(par_, tasks * divisions, [&](int64_t i, int64_t w) {
      Worker*& x = workers.data()[w];
      if (!x) x = new Worker(*this, (kv_heads + divisions - 1) / divisions);
      const Range range = range_of(i, divisions);
      // what this worker will most likely be given next
      const Range next = i + par_.threads < tasks * divisions ? range_of(i + par_.threads, divisions) : Range{};
      one_range(range, next, *x, parts.data());
    });
    for (int i = 0; i < par_.threads; ++i) delete workers.data()[i];
    parallel_tasks(par_, p_.shape.batch * kv_heads, [&](int64_t i, int64_t) {
      const int64_t b = i / kv_heads, count = first_part_.data()[b + 1] - first_part_.data()[b];
      if (count) join(b, i % kv_heads, count, parts.data());
    });
  }

 private:
  struct Worker {
    Scratch<Query> q;                         // (heads, padded rows, q_stride_)
    Scratch<float> parts;                     // (heads, part_size_): the results of a sequence that is one range
    Scratch<float> scores;                    // (heads, padded rows, kTile)
    Scratch<bf16> weights;                    // the same, for Bf16Math
    const Elem *k[2 * kTile], *v[2 * kTile];  // rows of head 0: the tile's, and those asked for ahead
    Scratch<TileView> views;                  // (heads): what of the tile their rows see
    int64_t slot[kTile];
    float k_scale[kTile], v_scale[kTile];

    Worker(const Decode& d, int64_t heads)
        : q(heads * padded(d.max_rows_) * d.q_stride_),
          parts(heads * d.part_size_),
          scores(heads * padded(d.max_rows_) * kTile),
          weights(Math::kKeysAtOnce == 2 ? heads * padded(d.max_rows_) * kTile : 0),
          views(heads) {
      __builtin_memset(static_cast<void*>(q.data()), 0, heads * padded(d.max_rows_) * d.q_stride_ * sizeof(Query));
    }
  };

  // The result of a range so far: (padded rows, width_) sums of weighted values, then the rows' maxima and totals, the
  // latter by lanes.
  struct Part {
    float *acc, *highest, *totals;
  };
  Part part(float* data) const {
    float* highest = data + padded(max_rows_) * width_;
    return {data, highest, highest + round_up(max_rows_, kLanes)};
  }

  static int64_t padded(int64_t rows) { return round_up(rows, kMaxRowBlock); }

  KeyRange all_keys(const Sequence& seq) const {
    const KeyRange a = visible_keys(p_.mask, seq, 0), z = visible_keys(p_.mask, seq, seq.num_q - 1);
    return {a.first, max64(z.last, a.first - 1)};
  }
  int64_t range_size(int64_t keys) const {
    return max64(kMinRange, round_up((keys + kMaxRanges - 1) / kMaxRanges, kTile));
  }
  int64_t ranges(const Sequence& seq) const {
    const KeyRange all = all_keys(seq);
    const int64_t keys = all.last - all.first + 1, size = range_size(keys);
    return max64(1, (keys + size - 1) / size);
  }

  // What a task works on: keys [first, last] and heads [head0, head1) of a sequence, range number `index` of it.
  struct Range {
    int64_t b = 0, index = 0, first = 0, last = -1, head0 = 0, head1 = 0;
    Sequence seq{};
    bool whole = false;  // all of the sequence
  };

  Range range_of(int64_t i, int64_t divisions) const {
    const int64_t task = i / divisions, division = i % divisions, kv_heads = p_.shape.kv_heads;
    Range x;
    int64_t high = p_.shape.batch;
    while (high - x.b > 1) {
      const int64_t mid = (x.b + high) / 2;
      (first_task_.data()[mid] <= task ? x.b : high) = mid;
    }
    x.index = task - first_task_.data()[x.b];
    x.seq = sequence(p_.shape, x.b);
    x.whole = first_part_.data()[x.b + 1] == first_part_.data()[x.b];
    const KeyRange all = all_keys(x.seq);
    const int64_t size = range_size(all.last - all.first + 1);
    x.first = all.first + x.index * size;
    x.last = min64(x.first + size - 1, all.last);
    x.head0 = kv_heads * division / divisions;
    x.head1 = kv_heads * (division + 1) / divisions;
    return x;
  }

  void one_range(const Range& range, const Range& next, Worker& x, float* parts) const {
    Task t{range.b, range.head0, 0, range.seq.num_q * group_, range.seq};
    const int64_t rows = padded(max_rows_);
    const auto index = [&] { return t.kv_head - range.head0; };
    const auto result = [&] {
      if (range.whole) return part(x.parts.data() + index() * part_size_);
      return part(parts + ((first_part_.data()[range.b] + range.index) * p_.shape.kv_heads + t.kv_head) * part_size_);
    };
    const auto each_head = [&](const auto& f) {
      for (t.kv_head = range.head0; t.kv_head < range.head1; ++t.kv_head) f();
    };
    const auto each_seeing_head = [&](const auto& f) {
      each_head([&] {
        if (x.views.data()[index()].end > 0) f();
      });
    };
    const auto scores = [&] { return x.scores.data() + index() * rows * kTile; };
    each_head([&] { begin(t, x.q.data() + index() * rows * q_stride_, result(), range.index == 0); });
    const int64_t k_ahead = keys_ahead(range, p_.shape.head_dim), v_ahead = keys_ahead(range, p_.shape.v_head_dim);
    const bool one_head = range.head1 - range.head0 == 1;  // its keys come in order whatever the span
    const int64_t k_span = one_head ? kTile : k_ahead, v_span = one_head ? kTile : v_ahead;
    const RowsView rows_view = view_rows(p_.mask, t, group_, 0, t.rows);
    for (int64_t key0 = range.first; key0 <= range.last; key0 += kTile) {
      const int64_t count = min64(kTile, range.last - key0 + 1);
      bool any = false;
      each_head([&] {
        TileView& view = x.views.data()[index()];  // block masks may differ by head, all else does not
        view = index() && !p_.mask.block_mask ? x.views.data()[0]
                                              : view_tile(p_.mask, t, group_, rows_view, key0, count, kPanel);
        any |= view.end > 0;
      });
      if (!any) continue;
      locate(range, next, key0, count, x);
      for (int64_t key = 0; key < count; key += k_span)
        each_seeing_head([&] {
          with_row_block(t.rows, [&](auto R) {
            RowBlock<Math, R>::dots(t.rows, x.q.data() + index() * rows * q_stride_, q_stride_, {x.k, k_ahead}, key,
                                    min64(k_span, count - key), t.kv_head * p_.k_strides.head, p_.shape.head_dim,
                                    scores());
          });
        });
      each_seeing_head([&] {
        softmax(t, x, key0, count, x.views.data()[index()], scores(), x.weights.data() + index() * rows * kTile,
                result());
      });
      for (int64_t key = 0; key < count; key += v_span)
        each_seeing_head([&] {
          const void* weights = scores();
          if constexpr (Math::kKeysAtOnce == 2) weights = x.weights.data() + index() * rows * kTile;
          with_row_block(t.rows, [&](auto R) {
            RowBlock<Math, R>::weigh(t.rows, static_cast<const typename Math::Weight*>(weights), {x.v, v_ahead}, key,
                                     min64(v_span, count - key), t.kv_head * p_.v_strides.head, p_.shape.v_head_dim,
                                     result().acc, width_);
          });
        });
    }
    each_head([&] {
      const Part done = result();
      for (int64_t r = 0; r < t.rows; ++r) done.totals[r] = reduce_sum(load(done.totals + r * kLanes));
      if (range.whole) write_rows(p_, t, group_, 0, t.rows, done.acc, width_, done.highest, done.totals);
    });
  }

  // Keys that take about kSpanBytes in all heads of a task: as many are read of a head before the next head's turn, and
  // so far ahead is asked for what comes. (More would leave L1 again before its turn.)
  int64_t keys_ahead(const Range& range, int64_t dim) const {
    const int64_t block = keys_per_block(range.seq.num_q * group_);
    const int64_t keys = kSpanBytes / ((range.head1 - range.head0) * dim * static_cast<int64_t>(sizeof(Elem)));
    return min64(kTile, max64(block, keys / block * block));
  }

  void begin(const Task& t, Query* q, const Part& to, bool with_sink) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      const void* row = at(p_.q, p_.q_dtype, row_offset(t, group_, r, p_.q_strides));
      if constexpr (sizeof(Query) == sizeof(float))
        row_to_float(row, p_.q_dtype, p_.shape.head_dim, q_stride_, 1.f, q + r * q_stride_);
      else
        __builtin_memcpy(q + r * q_stride_, row, p_.shape.head_dim * sizeof(Query));
      float total;
      begin_row(p_.mask, t.kv_head * group_ + r % group_, with_sink, to.highest[r], total);
      store(to.totals + r * kLanes, zero());
      to.totals[r * kLanes] = total;
    }
    __builtin_memset(to.acc, 0, padded(t.rows) * width_ * sizeof(float));
  }

  // Where a key's row of head 0 lies.
  int64_t offset(int64_t b, const Sequence& seq, int64_t key, const RowStrides& strides) const {
    const AttentionShape& s = p_.shape;
    if (!s.block_table) return b * strides.batch + (seq.k_start + key) * strides.row;
    return s.block_table[b * s.table_stride + key / s.block_size] * strides.batch + key % s.block_size * strides.row;
  }

  // The rows of a tile's keys and values, and of those after it: of this range, else of the one that comes next.
  void locate(const Range& range, const Range& next, int64_t key0, int64_t count, Worker& x) const {
    const Range* from = &range;
    int64_t key = key0;
    for (int64_t i = 0; i < 2 * kTile; ++i, ++key) {
      if (key > from->last && from == &range && next.last >= next.first) from = &next, key = next.first;
      if (i >= count && i < kTile) {  // a tile that ends early repeats its last key: the last dot products reach there
        x.k[i] = x.k[count - 1], x.v[i] = x.v[count - 1];
        continue;
      }
      const int64_t at = min64(key, from->last);
      x.k[i] = static_cast<const Elem*>(p_.k) + offset(from->b, from->seq, at, p_.k_strides);
      x.v[i] = static_cast<const Elem*>(p_.v) + offset(from->b, from->seq, at, p_.v_strides);
    }
    if (!p_.k_scale) return;
    const AttentionShape& s = p_.shape;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = key0 + i, block = s.block_table[range.b * s.table_stride + at / s.block_size];
      x.slot[i] = (block * s.block_size + at % s.block_size) * s.kv_heads;
    }
  }

  // Scores of one head's tile -> weights of its values, in place and, for pairs of bf16, in `pairs`.
  void softmax(const Task& t, Worker& x, int64_t key0, int64_t count, const TileView& view, float* scores, bf16* pairs,
               const Part& to) const {
    const int64_t end = round_up(count, kPanel);
    if (p_.k_scale)
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t slot = x.slot[min64(i, count - 1)] + t.kv_head;
        x.k_scale[i] = p_.k_scale[slot], x.v_scale[i] = p_.v_scale[slot];
      }
    for (int64_t r = 0; r < t.rows; ++r) {
      float* line = scores + r * kTile;
      if (p_.k_scale)
        for (int64_t c = 0; c < end; c += kLanes) store(line + c, load(line + c) * load(x.k_scale + c));
      ready_scores(p_.mask, bias_row(p_.mask, t, group_, r, key0), 0, end, line);
      if (view.partial || view.begin > 0 || view.end < count)
        mask_scores(p_.mask, t, group_, t.first_query + r / group_, r % group_, key0, TileView{0, count, end, true},
                    line);
      weigh_row(end, line, to.highest[r], to.totals + r * kLanes, to.acc + r * width_);
      if (p_.v_scale)
        for (int64_t c = 0; c < end; c += kLanes) store(line + c, load(line + c) * load(x.v_scale + c));
      if constexpr (Math::kKeysAtOnce == 2)
        for (int64_t c = 0; c < end; c += kLanes) store_operand(pairs + r * kTile + c, load(line + c));
    }
  }

  // Scores of a row -> weights relative to the row's maximum, an exponent of 2, in place. The maximum is looked for
  // across lanes only where it grows, and `totals` keeps a sum in each lane.
  LLMCORE_INLINE void weigh_row(int64_t end, float* s, float& highest, float* totals, float* acc) const {
    const float factor = exponent_factor(p_.mask);
    vf top = load(s);
    for (int64_t c = kLanes; c < end; c += kLanes) top = max(load(s + c), top);
    if (any_above(top * factor, highest)) {
      const float grown = reduce_max(top) * factor,
                  rescale = highest == kNegInf ? 0.f : __builtin_exp2f(highest - grown);
      store(totals, load(totals) * rescale);
      for (int64_t d = 0; d < width_; d += kLanes) store(acc + d, load(acc + d) * rescale);
      highest = grown;
    }
    const float base = highest == kNegInf ? 0.f : highest;  // nothing seen yet: -inf gives 0, and NaN stays
    vf total = load(totals);
    for (int64_t c = 0; c < end; c += kLanes) {
      const vf e = exp2_nonpositive(fma(load(s + c), set1(factor), set1(-base)));
      store(s + c, e);
      total += e;
    }
    store(totals, total);
  }

  void join(int64_t b, int64_t head, int64_t count, float* parts) const {
    const Sequence seq = sequence(p_.shape, b);
    const Task t{b, head, 0, seq.num_q * group_, seq};
    const auto at = [&](int64_t range) {
      return part(parts + ((first_part_.data()[b] + range) * p_.shape.kv_heads + head) * part_size_);
    };
    const Part all = at(0);
    for (int64_t range = 1; range < count; ++range) {
      const Part other = at(range);
      for (int64_t r = 0; r < t.rows; ++r)
        join_rows(all.acc + r * width_, all.highest[r], all.totals[r], other.acc + r * width_, other.highest[r],
                  other.totals[r], width_);
    }
    write_rows(p_, t, group_, 0, t.rows, all.acc, width_, all.highest, all.totals);
  }

  const AttentionParams& p_;
  const Parallel& par_;
  const int64_t group_, width_, q_stride_;
  Scratch<int64_t> first_task_, first_part_;  // (batch + 1): the tasks, and the parts to be joined, of each sequence
  int64_t max_rows_ = 1, part_size_ = 0;
};

}  // namespace

void attention_decode(const AttentionParams& p, const Parallel& par) {
  if constexpr (kHasBf16Dot) {
    const bool whole = p.shape.head_dim % Bf16Math::kWidth == 0 && p.shape.v_head_dim % kLanes == 0;
    if (whole && use_bf16_product(p.q_dtype, p.kv_dtype)) return Decode<Bf16Math>(p, par).run();
  }
  switch (p.kv_dtype) {
    case DType::f32: return Decode<FloatMath<float>>(p, par).run();
    case DType::bf16: return Decode<FloatMath<bf16>>(p, par).run();
    case DType::f16: return Decode<FloatMath<f16>>(p, par).run();
    case DType::i8: return Decode<FloatMath<int8_t>>(p, par).run();
    case DType::f8: return Decode<FloatMath<f8>>(p, par).run();
  }
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
