// What the forward and the backward pass of attention share: the rows of a task, what each row sees, and how keys are
// brought into the order of the matrix product.
//
// A task is a block of queries of one sequence together with all query heads that share one KV head ("the group"), so
// that a packed tile of keys serves them all. Its rows are ordered query-major: row r is query first_query + r / group,
// head kv_head * group + r % group. Rows are worked on in sub-blocks of kSubRows.
#pragma once
#include "gemm.h"
#include "llmcore/attention.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

constexpr int64_t kSubRows = 48;  // a multiple of kTileRows; with kKeys columns its scores take 12 KiB: L1
constexpr int64_t kKeys = 64;     // keys in a tile, a multiple of kPanel: a packed K tile of head size 128 is 32 KiB
static_assert(kSubRows % kTileRows == 0 && kKeys % kPanel == 0, "tile sizes");

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

// The part of a tile that a sub-block of rows sees: columns [begin, end), begin a multiple of kPanel. `partial` when
// some row sees less than all of it.
struct TileView {
  int64_t begin, end;
  bool partial;
};

// rows [row0, row0 + rows) of the task against the keys [key0, key0 + count)
inline TileView view_tile(const AttentionMask& m, const Task& t, int64_t group, int64_t row0, int64_t rows,
                          int64_t key0, int64_t count) {
  const int64_t q_first = t.first_query + row0 / group, q_last = t.first_query + (row0 + rows - 1) / group;
  // Ranges move right with the query, so the first and the last query bound them all.
  const KeyRange a = visible_keys(m, t.seq, q_first), z = visible_keys(m, t.seq, q_last);
  const int64_t first = max64(a.first, key0), last = min64(z.last, key0 + count - 1);
  if (last < first) return {0, 0, false};
  TileView view{(first - key0) / kPanel * kPanel, last - key0 + 1, false};
  view.partial = z.first > key0 + view.begin || a.last < last || round_up(view.end, kPanel) != view.end;
  if (m.block_mask) {
    bool any = false, all = true;
    for (int64_t r = row0; r < row0 + rows; ++r) {
      const uint8_t* seen = mask_row(m, t.b, t.kv_head * group + r % group, t.first_query + r / group);
      for (int64_t c = first / m.block_k; c <= last / m.block_k; ++c) (seen[c] ? any : all) = seen[c];
    }
    if (!any) return {0, 0, false};
    view.partial |= !all;
  }
  return view;
}

// Writes -inf over the scores (columns [view.begin, round_up(view.end)) of `s`) that row `r` of the task must not see.
inline void mask_scores(const AttentionMask& m, const Task& t, int64_t group, int64_t r, int64_t key0,
                        const TileView& view, float* s) {
  const int64_t query = t.first_query + r / group;
  const KeyRange range = visible_keys(m, t.seq, query);
  const int64_t end = round_up(view.end, kPanel);
  const int64_t first = min64(max64(range.first - key0, view.begin), end);
  const int64_t last = max64(min64(range.last - key0 + 1, end), first);
  for (int64_t c = view.begin; c < first; ++c) s[c] = kNegInf;
  for (int64_t c = last; c < end; ++c) s[c] = kNegInf;
  if (!m.block_mask) return;
  const uint8_t* seen = mask_row(m, t.b, t.kv_head * group + r % group, query);
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
LLMCORE_INLINE bool ready_first(const AttentionMask& m) { return m.softcap > 0 || m.scale <= 0; }
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
  const Elem* row[kKeys];
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

// Row r of a task's q (or dout, ...): its query row and head.
LLMCORE_INLINE int64_t row_offset(const Task& t, int64_t group, int64_t r, const RowStrides& s) {
  return t.b * s.batch + (t.seq.q_start + t.first_query + r / group) * s.row + (t.kv_head * group + r % group) * s.head;
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

// Scores -> unnormalised probabilities of one row, in place; updates the row's running maximum (an exponent of 2) and
// sum, and rescales its accumulator.
inline void softmax_row(float factor, int64_t begin, int64_t end, float* s, float& highest, float& total, float* acc,
                        int64_t acc_size) {
  vf top = set1(kNegInf);
  for (int64_t c = begin; c < end; c += kLanes) top = max(load(s + c), top);
  const float tile_top = reduce_max(top) * factor;
  if (tile_top == kNegInf) {  // nothing seen, or only NaN: those must reach the output
    bool nan = false;
    for (int64_t c = begin; c < end; ++c) nan |= s[c] != s[c];
    if (!nan) {
      for (int64_t c = begin; c < end; c += kLanes) store(s + c, zero());
      return;
    }
  }
  if (tile_top > highest) {
    const float rescale = highest == kNegInf ? 0.f : __builtin_exp2f(highest - tile_top);
    total *= rescale;
    for (int64_t d = 0; d < acc_size; d += kLanes) store(acc + d, load(acc + d) * rescale);
    highest = tile_top;
  }
  vf sum = zero();
  for (int64_t c = begin; c < end; c += kLanes) {
    const vf e = exp2_nonpositive(fma(load(s + c), set1(factor), set1(-highest)));
    store(s + c, e);
    sum += e;
  }
  total += reduce_sum(sum);
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

// A task's rows of out and lse.
inline void write_rows(const AttentionParams& p, const Task& t, int64_t group, const float* acc, int64_t width,
                       const float* highest, const float* total) {
  for (int64_t r = 0; r < t.rows; ++r) {
    void* out = const_cast<void*>(at(p.out, p.q_dtype, row_offset(t, group, r, p.out_strides)));
    const float sum = total[r];
    row_from_float(acc + r * width, p.q_dtype, p.shape.v_head_dim, sum == 0.f ? 0.f : 1.f / sum, out);
    if (!p.lse) continue;
    const int64_t query = t.seq.q_start + t.first_query + r / group, head = t.kv_head * group + r % group;
    p.lse[t.b * p.lse_batch + head * p.lse_head + query] =
        sum == 0.f ? kNegInf : highest[r] * kLn2 + __builtin_logf(sum);
  }
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
