// What the forward and the backward pass of attention share: the rows of a task, what each row sees, and how keys are
// brought into the order of the matrix product.
//
// A task is a block of queries of one sequence together with all query heads that share one KV head ("the group"), so
// that a packed tile of keys serves them all. Its rows are ordered query-major: row r is query first_query + r / group,
// head kv_head * group + r % group.
#pragma once
#include "gemm.h"
#include "llmcore/attention.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

constexpr int64_t kMaxKeys = 128;  // in a tile of keys, a multiple of kPanel
static_assert(kMaxKeys % kPanel == 0, "tile sizes");

LLMCORE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LLMCORE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr float kNegInf = -__builtin_inff();

struct Sequence {
  int64_t num_q, num_k;      // queries and keys
  int64_t q_start, k_start;  // their first rows in packed tensors, else 0
};

inline Sequence sequence(const AttentionShape& s, int64_t b) {
  Sequence x{s.seq_q, s.seq_k, 0, 0};
  if (s.cu_q) x.q_start = s.cu_q[b], x.num_q = s.cu_q[b + 1] - s.cu_q[b];
  if (s.cu_k) x.k_start = s.cu_k[b], x.num_k = s.cu_k[b + 1] - s.cu_k[b];
  if (s.block_table) x.num_k = s.kv_lens[b];
  return x;
}

// Up to this many rows (queries times the query heads of a KV head) a sequence's keys are read as they lie, by
// attention_decode(): packing them would cost more than it saves.
constexpr int64_t kDecodeRows = 32;
LLMCORE_INLINE bool decodes(const AttentionShape& s, const Sequence& seq) {
  return seq.num_q * (s.heads / s.kv_heads) <= kDecodeRows;
}

struct Task {
  int64_t b, kv_head, first_query, rows;
  Sequence seq;
};

// All tasks of a call, but for the sequences that attention_decode() serves, in the order they are handed out: within a
// sequence the last queries first, since under a causal mask they see the most keys.
class TaskList {
 public:
  TaskList(const AttentionShape& shape, int64_t queries_per_task)
      : shape_(shape), queries_(queries_per_task), start_(shape.batch + 1) {
    start_.data()[0] = 0;
    for (int64_t b = 0; b < shape.batch; ++b) start_.data()[b + 1] = start_.data()[b] + tasks(sequence(shape, b));
  }
  int64_t size() const { return start_.data()[shape_.batch]; }
  Task operator[](int64_t i) const {
    int64_t low = 0, high = shape_.batch;  // the sequence whose range of tasks holds i
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (start_.data()[mid] <= i ? low : high) = mid;
    }
    const Sequence seq = sequence(shape_, low);
    const int64_t rest = i - start_.data()[low], block = blocks(seq.num_q) - 1 - rest / shape_.kv_heads;
    const int64_t first = block * queries_, group = shape_.heads / shape_.kv_heads;
    return {low, rest % shape_.kv_heads, first, min64(queries_, seq.num_q - first) * group, seq};
  }

 private:
  int64_t tasks(const Sequence& seq) const { return decodes(shape_, seq) ? 0 : blocks(seq.num_q) * shape_.kv_heads; }
  int64_t blocks(int64_t queries) const { return (queries + queries_ - 1) / queries_; }
  const AttentionShape& shape_;
  int64_t queries_;
  Scratch<int64_t> start_;
};

// The keys that query `i` sees by position: [first, last], empty when last < first.
struct KeyRange {
  int64_t first, last;
};
inline KeyRange visible_keys(const AttentionMask& m, const Sequence& seq, int64_t query) {
  const int64_t position = query + seq.num_k - seq.num_q;
  KeyRange r{0, seq.num_k - 1};
  if (m.causal) r.last = min64(r.last, position);
  if (m.window) {
    r.first = max64(r.first, position - m.window + 1);
    r.last = min64(r.last, position + m.window - 1);
  }
  return r;
}

inline const uint8_t* mask_row(const AttentionMask& m, int64_t b, int64_t head, int64_t query) {
  return m.block_mask + b * m.mask_batch + head * m.mask_head + query / m.block_q * m.mask_row;
}

// What a few rows see by position: the first of their queries and the last. Ranges move right with the query, so these
// two bound them all.
struct RowsView {
  int64_t q_first, q_last;
  KeyRange first, last;
};
inline RowsView view_rows(const AttentionMask& m, const Task& t, int64_t group, int64_t row0, int64_t rows) {
  const int64_t q_first = t.first_query + row0 / group, q_last = t.first_query + (row0 + rows - 1) / group;
  return {q_first, q_last, visible_keys(m, t.seq, q_first), visible_keys(m, t.seq, q_last)};
}

// The part of a tile that rows see: columns [begin, end), as vectors [begin, stop). `partial` when some row sees less
// than all of those.
struct TileView {
  int64_t begin, end, stop;
  bool partial;
};

// Some rows of the task against the keys [key0, key0 + count). begin and stop are multiples of `grain`.
inline TileView view_tile(const AttentionMask& m, const Task& t, int64_t group, const RowsView& rows, int64_t key0,
                          int64_t count, int64_t grain) {
  const int64_t first = max64(rows.first.first, key0), last = min64(rows.last.last, key0 + count - 1);
  if (last < first) return {0, 0, 0, false};
  TileView view{(first - key0) / grain * grain, last - key0 + 1, round_up(last - key0 + 1, grain), false};
  view.partial = rows.last.first > key0 + view.begin || rows.first.last < last || view.stop != view.end;
  if (m.block_mask) {
    bool any = false, all = true;
    const int64_t heads = m.mask_head ? group : 1;  // with a stride of 0 all share one mask
    for (int64_t q = rows.q_first / m.block_q; q <= rows.q_last / m.block_q; ++q)
      for (int64_t h = 0; h < heads; ++h) {
        const uint8_t* seen = mask_row(m, t.b, t.kv_head * group + h, q * m.block_q);
        for (int64_t c = first / m.block_k; c <= last / m.block_k; ++c) (seen[c] ? any : all) = seen[c];
      }
    if (!any) return {0, 0, 0, false};
    view.partial |= !all;
  }
  return view;
}

// Writes -inf over the scores (columns [view.begin, view.stop) of `s`) that `query`, in head `head` of the group, must
// not see.
inline void mask_scores(const AttentionMask& m, const Task& t, int64_t group, int64_t query, int64_t head, int64_t key0,
                        const TileView& view, float* s) {
  const KeyRange range = visible_keys(m, t.seq, query);
  const int64_t first = min64(max64(range.first - key0, view.begin), view.stop);
  const int64_t last = max64(min64(range.last - key0 + 1, view.stop), first);
  const auto hide = [&](int64_t from, int64_t to) {  // all of [from, to) but [first, last)
    for (int64_t c = from; c < to; c += kLanes) {
      const vi at = iota() + static_cast<int32_t>(c);
      const vf x = load(s + c);
      store(s + c, (at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(last)) ? x : set1(kNegInf));
    }
  };
  hide(view.begin, first);
  hide(max64(last / kLanes * kLanes, view.begin), view.stop);
  if (!m.block_mask) return;
  const uint8_t* seen = mask_row(m, t.b, t.kv_head * group + head, query);
  for (int64_t c = first; c < last;) {
    const int64_t block = (key0 + c) / m.block_k, block_end = min64((block + 1) * m.block_k - key0, last);
    if (!seen[block])
      for (int64_t i = c; i < block_end; ++i) s[i] = kNegInf;
    c = block_end;
  }
}

// What a row of scores takes of the position bias: column c the element clamp(offset + c) of `table`, whose elements
// run from -reach to reach. No table: no bias.
struct BiasRow {
  const float* table;
  int64_t reach, offset;
  LLMCORE_INLINE int64_t index(int64_t c) const { return max64(-reach, min64(offset + c, reach)); }
  LLMCORE_INLINE vf at(int64_t c) const {  // of columns c and on
    const int64_t first = offset + c, last = first + kLanes - 1;
    if (first >= -reach && last <= reach) return load(table + first);
    if (last <= -reach || first >= reach) return set1(table[index(c)]);
    float each[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) each[i] = table[index(c + i)];
    return load(each);
  }
};
// of row `r` of the task, whose columns begin at key0
inline BiasRow bias_row(const AttentionMask& m, const Task& t, int64_t group, int64_t r, int64_t key0) {
  if (!m.position_bias) return {nullptr, 0, 0};
  const int64_t position = t.first_query + r / group + t.seq.num_k - t.seq.num_q, head = t.kv_head * group + r % group;
  return {m.position_bias + head * (2 * m.bias_reach + 1) + m.bias_reach, m.bias_reach, key0 - position};
}

// Scores become exponents of 2: score * exponent_factor. The product is formed where it is used, so that
// fma(score, factor, -highest) rounds once. With a soft cap, or a scale that would turn -inf around, ready_scores()
// replaces the scores by exponents beforehand and the factor is 1. With a position bias, beside which there is no soft
// cap, it scales them and adds the bias in one rounding.
LLMCORE_INLINE bool ready_first(const AttentionMask& m) { return m.position_bias || m.softcap > 0 || m.scale <= 0; }
LLMCORE_INLINE float exponent_factor(const AttentionMask& m) {
  if (m.position_bias) return kLog2e;
  return ready_first(m) ? 1.f : m.scale * kLog2e;
}
inline void ready_scores(const AttentionMask& m, const BiasRow& bias, int64_t begin, int64_t end, float* s) {
  if (bias.table) {
    for (int64_t c = begin; c < end; c += kLanes) store(s + c, fma(load(s + c), set1(m.scale), bias.at(c)));
    return;
  }
  if (!ready_first(m)) return;
  if (m.softcap > 0) {
    const float in = m.scale / m.softcap, out = m.softcap * kLog2e;
    for (int64_t c = begin; c < end; c += kLanes) store(s + c, tanh(load(s + c) * in) * out);
  } else {
    for (int64_t c = begin; c < end; c += kLanes) store(s + c, load(s + c) * (m.scale * kLog2e));
  }
}

// ---- rows of q, k, v -----------------------------------------------------------------------------------------------

// One row of `dim` elements as floats, padded with zeros to `padded`.
inline void row_to_float(const void* row, DType dtype, int64_t dim, int64_t padded, float factor, float* out) {
  int64_t i = 0;
  const auto convert = [&](const auto* in) {
    for (; i + kLanes <= dim; i += kLanes) store(out + i, load(in + i) * factor);
    for (; i < dim; ++i) out[i] = to_float(in[i]) * factor;
  };
  switch (dtype) {
    case DType::f32: convert(static_cast<const float*>(row)); break;
    case DType::bf16: convert(static_cast<const bf16*>(row)); break;
    case DType::f16: convert(static_cast<const f16*>(row)); break;
    case DType::i8: convert(static_cast<const int8_t*>(row)); break;
    case DType::f8: convert(static_cast<const f8*>(row)); break;
  }
  for (; i < padded; ++i) out[i] = 0.f;
}
inline void row_from_float(const float* in, DType dtype, int64_t dim, float factor,
                           void* row){LLMCORE_DISPATCH_FLOAT(dtype, T,
                                                             {
                                                               T* out = static_cast<T*>(row);
                                                               int64_t i = 0;
                                                               for (; i + kLanes <= dim; i += kLanes)
                                                                 store(out + i, load(in + i) * factor);
                                                               for (; i < dim; ++i)
                                                                 out[i] = from_float<T>(in[i] * factor);
                                                             })}

LLMCORE_INLINE int64_t element_size(DType t) {
  return t == DType::f32 ? 4 : has_scales(t) ? 1 : 2;
}
LLMCORE_INLINE const void* at(const void* base, DType t, int64_t offset) {
  return static_cast<const char*>(base) + offset * element_size(t);
}

// A tile of rows of k or v as the product wants them: pointers to the rows themselves when they have the product's
// element type, else to converted copies.
template <class Elem>  // float or bf16
struct TileRows {
  const Elem* row[kMaxKeys];
};

// Key rows [key0, key0 + count) of the task's sequence and KV head. `copy` holds count * dim floats.
template <class Elem>
inline void tile_rows(const AttentionShape& shape, const Task& t, const void* base, DType dtype,
                      const RowStrides& strides, const float* scales, int64_t dim, int64_t key0, int64_t count,
                      float* copy, TileRows<Elem>& out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t key = key0 + i;
    int64_t offset = t.kv_head * strides.head, slot = 0;
    if (shape.block_table) {
      const int64_t block = shape.block_table[t.b * shape.table_stride + key / shape.block_size];
      offset += block * strides.batch + key % shape.block_size * strides.row;
      slot = (block * shape.block_size + key % shape.block_size) * shape.kv_heads + t.kv_head;
    } else {
      offset += t.b * strides.batch + (t.seq.k_start + key) * strides.row;
    }
    const void* row = at(base, dtype, offset);
    if constexpr (sizeof(Elem) == sizeof(float)) {
      if (dtype == DType::f32 && !scales) {
        out.row[i] = static_cast<const float*>(row);
      } else {
        row_to_float(row, dtype, dim, dim, scales ? scales[slot] : 1.f, copy + i * dim);
        out.row[i] = copy + i * dim;
      }
    } else {
      out.row[i] = static_cast<const Elem*>(row);
    }
  }
}

// A row of a task: its query and its head within the group.
struct TaskRow {
  int64_t query, head;
  int64_t offset(const Task& t, int64_t group, const RowStrides& s) const {  // in q, or out, ...
    return t.b * s.batch + (t.seq.q_start + query) * s.row + (t.kv_head * group + head) * s.head;
  }
};
// f(i, row) for the rows row0 + i, i < rows. Without a division for each, which costs as much as half of its loads.
template <class F>
LLMCORE_INLINE void for_task_rows(const Task& t, int64_t group, int64_t row0, int64_t rows, const F& f) {
  TaskRow row{t.first_query + row0 / group, row0 % group};
  for (int64_t i = 0; i < rows; ++i) {
    f(i, row);
    if (++row.head == group) row.head = 0, ++row.query;
  }
}
LLMCORE_INLINE int64_t row_offset(const Task& t, int64_t group, int64_t r, const RowStrides& s) {
  return TaskRow{t.first_query + r / group, r % group}.offset(t, group, s);
}

// One row in the product's element type, zero-padded to `steps`: the row-major A operand.
template <class Product>
inline void load_row(const void* row, DType dtype, int64_t dim, int64_t steps, typename Product::Elem* out) {
  if constexpr (Product::kStep == 1) {
    row_to_float(row, dtype, dim, steps, 1.f, out);
  } else {
    for (int64_t s = dim / 2; s < steps; ++s) out[s] = 0;  // an odd dim leaves half an element
    __builtin_memcpy(out, row, dim * sizeof(bf16));
  }
}

// Whether bf16 products serve a call: the machine has them and both operands are bf16.
LLMCORE_INLINE bool use_bf16_product(DType q, DType kv) { return kHasBf16Dot && q == DType::bf16 && kv == DType::bf16; }

// ---- rows of a result ----------------------------------------------------------------------------------------------

// Of up to kTileRows rows: the largest exponent so far, or a little less, and the sum of 2^(exponent - highest).
// Accumulators are rescaled only when an exponent exceeds `highest` by more than this: a power of 2 up to 2^8 is as
// exact as one below 1, and rescaling becomes rare.
constexpr float kHeadroom = 8.f;

// Scores, columns [begin, end) of lines `width` apart, -> unnormalised probabilities in `out`, likewise. highest[r] and
// total[r] of the rows are updated, lanes beyond `rows` read and left as they are; rows of `acc` rescaled.
template <class Out>
inline void softmax_tile(float factor, int64_t rows, int64_t begin, int64_t end, int64_t width, const float* s,
                         Out* out, float* highest, float* total, float* acc, int64_t acc_size) {
  constexpr int64_t kGroups = (kTileRows + kLanes - 1) / kLanes;
  for (int64_t group = 0; group < kGroups && group * kLanes < rows; ++group) {
    const int64_t row0 = group * kLanes, count = min64(kLanes, rows - row0);
    const float* line = s + row0 * width;
    vf each[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) each[r] = set1(kNegInf);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = begin; c < end; c += kLanes) each[r] = max(load(line + r * width + c), each[r]);
    const vf top = max_each(each) * factor;
    vf high = load(highest + row0), sum = load(total + row0);
    if (any_above(top - high, kHeadroom)) {
      const vf next = top - high > kHeadroom ? top : high;
      // The first time there is nothing to rescale: highest is -inf, and the factor 2^-inf = 0.
      const vf rescale = next == high ? set1(1.f) : exp2_nonpositive(high - next);
      store(total + row0, sum *= rescale);
      store(highest + row0, next);
      for (int64_t r = 0; r < count; ++r)
        if (next[r] != high[r] && high[r] != kNegInf)
          for (int64_t d = 0; d < acc_size; d += kLanes) {
            float* at = acc + (row0 + r) * acc_size + d;
            store(at, load(at) * rescale[r]);
          }
      high = next;
    }
    const vf base = high == kNegInf ? zero() : high;  // nothing seen yet: 2^-inf, not 2^NaN
    for (int64_t r = 0; r < kLanes; ++r) each[r] = zero();
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = begin; c < end; c += kLanes) {
        const vf e = exp2_nonpositive(fma(load(line + r * width + c), set1(factor), set1(-base[r])));
        store_operand(out + (row0 + r) * width + c, e);
        each[r] += e;
      }
    store(total + row0, sum + sum_each(each));
  }
}

// The state of a row before its first key. A sink is a score whose value is the zero vector.
inline void begin_row(const AttentionMask& m, int64_t head, bool with_sink, float& highest, float& total) {
  highest = kNegInf, total = 0.f;
  if (m.sinks && with_sink) highest = m.sinks[head] * kLog2e, total = 1.f;
}

// (acc, highest, total) of a row joined with those of other keys.
inline void join_rows(float* acc, float& highest, float& total, const float* other, float other_highest,
                      float other_total, int64_t width) {
  const float top = highest > other_highest ? highest : other_highest;
  const float a = highest == top ? 1.f : __builtin_exp2f(highest - top);
  const float b = other_highest == top ? 1.f : __builtin_exp2f(other_highest - top);
  for (int64_t d = 0; d < width; d += kLanes) store(acc + d, load(acc + d) * a + load(other + d) * b);
  total = total * a + other_total * b;
  highest = top;
}

// Rows [row0, row0 + rows) of a task's out and lse, from their accumulators, maxima and sums.
inline void write_rows(const AttentionParams& p, const Task& t, int64_t group, int64_t row0, int64_t rows,
                       const float* acc, int64_t width, const float* highest, const float* total) {
  for_task_rows(t, group, row0, rows, [&](int64_t i, TaskRow row) {
    void* out = const_cast<void*>(at(p.out, p.q_dtype, row.offset(t, group, p.out_strides)));
    const float sum = total[i];
    row_from_float(acc + i * width, p.q_dtype, p.shape.v_head_dim, sum == 0.f ? 0.f : 1.f / sum, out);
    if (!p.lse) return;
    const int64_t head = t.kv_head * group + row.head;
    p.lse[t.b * p.lse_batch + head * p.lse_head + t.seq.q_start + row.query] =
        sum == 0.f ? kNegInf : highest[i] * kLn2 + __builtin_logf(sum);
  });
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
