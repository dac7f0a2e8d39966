// The backward pass: recomputes the probabilities of each tile from q, k and lse (FlashAttention-2, arXiv 2307.08691,
// algorithm 2) with queries in the outer loop. A worker takes all queries of one KV head (or, when there are few KV
// heads, an interleaved share of its query blocks), so dK and dV are its own until the end: no atomics, and the same
// bits in every run with the same number of threads.
#include "llmcore/attention.h"

#include "attention_tile.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kKeys = 64;                 // in a tile of keys: a packed one of head size 128 is 32 KiB
constexpr int64_t kSubRows = 48;              // a multiple of kTileRows; with kKeys columns its scores take 12 KiB: L1
constexpr int64_t kBlockRows = 3 * kSubRows;  // rows of q whose packed forms stay in L2 while the keys pass
static_assert(kSubRows % kTileRows == 0 && kKeys % kPanel == 0 && kKeys <= kMaxKeys, "tile sizes");

template <class Product>
struct Worker {
  using Elem = typename Product::Elem;
  int64_t rows;                                // capacity
  Scratch<Elem> q, dout;                       // (rows, steps): row-major operands
  Scratch<Elem> q_panels, dout_panels;         // panels of (row steps, kPanel)
  Scratch<Elem> k_by_dim, v_by_dim, k_by_key;  // k^T and v^T in panels of keys; k in panels of dims
  Scratch<float> dq, lse, delta, p, ds, k_copy, v_copy, row_copy;
  Scratch<Elem> p_pairs, ds_pairs, ds_rows;  // bf16 forms of p and ds
  TileRows<typename Product::Value> k_rows, v_rows;

  Worker(const AttentionShape& s, int64_t rows)
      : rows(rows),
        q(rows * steps_of<Product>(s.head_dim)),
        dout(rows * steps_of<Product>(s.v_head_dim)),
        q_panels(round_up(s.head_dim, kPanel) * steps_of<Product>(rows)),
        dout_panels(round_up(s.v_head_dim, kPanel) * steps_of<Product>(rows)),
        k_by_dim(kKeys * steps_of<Product>(s.head_dim)),
        v_by_dim(kKeys * steps_of<Product>(s.v_head_dim)),
        k_by_key(round_up(s.head_dim, kPanel) * steps_of<Product>(kKeys)),
        dq(rows * round_up(s.head_dim, kPanel)),
        lse(rows),
        delta(rows),
        p(kSubRows * kKeys),
        ds(kSubRows * kKeys),
        k_copy(kKeys * s.head_dim),
        v_copy(kKeys * s.v_head_dim),
        row_copy(2 * s.v_head_dim + 2 * kLanes),
        p_pairs(Product::kStep == 2 ? kSubRows / 2 * kKeys : 0),
        ds_pairs(Product::kStep == 2 ? kSubRows / 2 * kKeys : 0),
        ds_rows(Product::kStep == 2 ? kSubRows * kKeys / 2 : 0) {}
};

// Two rows of floats as pairs of bf16, and one row as bf16: the forms the bf16 product takes.
inline void pair_rows(const float* even, const float* odd, int64_t begin, int64_t end, uint32_t* out) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const vu pair = operand_pair(load(even + c), odd ? load(odd + c) : zero());
    __builtin_memcpy(out + c, &pair, sizeof(pair));
  }
}

template <class Product>
class Backward {
  using W = Worker<Product>;
  using Elem = typename Product::Elem;

 public:
  Backward(const AttentionBackwardParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        group_(p.shape.heads / p.shape.kv_heads),
        splits_(splits(p.shape, par.threads)),
        queries_(queries_per_block()),
        dk_width_(round_up(p.shape.head_dim, kPanel)),
        dv_width_(round_up(p.shape.v_head_dim, kPanel)) {
    for (int64_t b = 0; b < p.shape.batch; ++b) max_k_ = max64(max_k_, sequence(p.shape, b).num_k);
  }

  void run() {
    const int64_t heads = p_.shape.batch * p_.shape.kv_heads;
    if (heads == 0) return;
    const int64_t splits = splits_, tasks = heads * splits, stride = max_k_ * (dk_width_ + dv_width_);
    // One accumulator per worker, or one per task when several tasks share a KV head.
    Scratch<float> accumulators((splits == 1 ? min64(par_.threads, tasks) : tasks) * stride);
    Scratch<double> dsinks(tasks * group_);  // each sums as many terms as there are queries
    Scratch<double> dbias(p_.dbias ? tasks * group_ * bias_width() : 0);
    Scratch<W*> workers(par_.threads);
    for (int i = 0; i < par_.threads; ++i) workers.data()[i] = nullptr;
    parallel_tasks(par_, tasks, [&](int64_t i, int64_t w) {
      W*& x = workers.data()[w];
      if (!x) x = new W(p_.shape, queries_ * group_);
      float* acc = accumulators.data() + (splits == 1 ? w : i) * stride;
      double* bias = p_.dbias ? dbias.data() + i * group_ * bias_width() : nullptr;
      one_head(i / splits, i % splits, splits, *x, acc, dsinks.data() + i * group_, bias);
      if (splits == 1) write_keys(i, acc, 1, stride);
    });
    for (int i = 0; i < par_.threads; ++i) delete workers.data()[i];
    if (splits > 1)
      parallel_tasks(par_, heads, [&](int64_t i, int64_t) {
        write_keys(i, accumulators.data() + i * splits * stride, splits, stride);
      });
    if (p_.dsinks)
      for (int64_t i = 0; i < tasks; ++i) {
        const int64_t head = i / splits, b = head / p_.shape.kv_heads, kv_head = head % p_.shape.kv_heads;
        for (int64_t g = 0; g < group_; ++g)
          p_.dsinks[b * p_.shape.heads + kv_head * group_ + g] += dsinks.data()[i * group_ + g];
      }
    if (p_.dbias) {
      const int64_t size = group_ * bias_width();
      for (int64_t i = 0; i < tasks; ++i)
        for (int64_t j = 0; j < size; ++j) p_.dbias[i / splits * size + j] += dbias.data()[i * size + j];
    }
  }

 private:
  int64_t bias_width() const { return 2 * p_.mask.bias_reach + 1; }

  // dk (max_k, dk_width_) and dv (max_k, dv_width_) of one KV head, from the query blocks of share `split`.
  void one_head(int64_t index, int64_t split, int64_t splits, W& x, float* acc, double* dsinks, double* dbias) const {
    const int64_t b = index / p_.shape.kv_heads, kv_head = index % p_.shape.kv_heads;
    const Sequence seq = sequence(p_.shape, b);
    float *dk = acc, *dv = acc + max_k_ * dk_width_;
    __builtin_memset(dk, 0, seq.num_k * dk_width_ * sizeof(float));
    __builtin_memset(dv, 0, seq.num_k * dv_width_ * sizeof(float));
    for (int64_t g = 0; g < group_; ++g) dsinks[g] = 0;
    for (int64_t j = 0; dbias && j < group_ * bias_width(); ++j) dbias[j] = 0;
    const int64_t blocks = (seq.num_q + queries_ - 1) / queries_;
    for (int64_t turn = 0; turn * splits < blocks; ++turn) {
      // there and back, so that early blocks, which see few keys, meet late ones in a share
      const int64_t first = (turn * splits + (turn % 2 ? splits - 1 - split : split)) * queries_;
      if (first >= seq.num_q) continue;
      const Task t{b, kv_head, first, min64(queries_, seq.num_q - first) * group_, seq};
      load_queries(t, x);
      const KeyRange a = visible_keys(p_.mask, seq, first);
      const KeyRange z = visible_keys(p_.mask, seq, first + t.rows / group_ - 1);
      if (exact_delta()) sum_delta(t, x, a.first, z.last);
      if (p_.mask.sinks) add_sink_gradients(t, x, dsinks);
      for (int64_t key0 = a.first; key0 <= z.last; key0 += kKeys)
        one_tile(t, x, key0, min64(kKeys, z.last + 1 - key0), dk + key0 * dk_width_, dv + key0 * dv_width_, dbias);
      for (int64_t r = 0; r < t.rows; ++r)
        row_from_float(x.dq.data() + r * dk_width_, p_.dtype, p_.shape.head_dim, p_.mask.scale,
                       const_cast<void*>(at(p_.dq, p_.dtype, row_offset(t, group_, r, p_.dq_strides))));
    }
  }

  // The row constant delta is out . dout, but for the rounding of `out` to 16 bits. In the gradients of q and k that is
  // one error among many; a column of the bias adds up the scores of whole rows, whose gradients nearly cancel. So with
  // a bias delta is what it stands for, the sum of p * dp over the keys, at the price of forming both once more.
  bool exact_delta() const { return p_.dbias && p_.dtype != DType::f32; }

  int64_t lse_at(const Task& t, int64_t r) const {
    const int64_t head = t.kv_head * group_ + r % group_;
    return t.b * p_.lse_batch + head * p_.lse_head + t.seq.q_start + t.first_query + r / group_;
  }

  void load_queries(const Task& t, W& x) const {
    const AttentionShape& s = p_.shape;
    const int64_t q_steps = steps_of<Product>(s.head_dim), v_steps = steps_of<Product>(s.v_head_dim);
    float *out = x.row_copy.data(), *dout = out + s.v_head_dim + kLanes;
    for (int64_t r = 0; r < t.rows; ++r) {
      const void* dout_row = at(p_.dout, p_.dtype, row_offset(t, group_, r, p_.dout_strides));
      load_row<Product>(at(p_.q, p_.dtype, row_offset(t, group_, r, p_.q_strides)), p_.dtype, s.head_dim, q_steps,
                        x.q.data() + r * q_steps);
      load_row<Product>(dout_row, p_.dtype, s.v_head_dim, v_steps, x.dout.data() + r * v_steps);
      row_to_float(at(p_.out, p_.dtype, row_offset(t, group_, r, p_.out_strides)), p_.dtype, s.v_head_dim, s.v_head_dim,
                   1.f, out);
      row_to_float(dout_row, p_.dtype, s.v_head_dim, s.v_head_dim, 1.f, dout);
      vf sum = zero();
      for (int64_t d = 0; d < s.v_head_dim; d += kLanes) {
        const int64_t n = s.v_head_dim - d;
        sum = fma(load_n(out + d, n), load_n(dout + d, n), sum);
      }
      const int64_t at_row = lse_at(t, r);
      const float lse = p_.lse[at_row], product = exact_delta() ? 0.f : reduce_sum(sum);
      // ds = p * (dp - delta): the gradient of lse enters as a constant of the row. A row without keys has no gradient,
      // whatever reaches its lse (NaN, when -inf goes on through a logarithm).
      x.delta.data()[r] = lse == kNegInf ? 0.f : product - (p_.dlse ? p_.dlse[at_row] : 0.f);
      x.lse.data()[r] = lse == kNegInf ? -kNegInf : lse * kLog2e;  // no key: every probability is 2^-inf = 0
    }
    const int64_t row_steps = steps_of<Product>(x.rows);
    pack_columns(x.q_panels.data(), x.q.data(), q_steps, s.head_dim, t.rows, row_steps);
    pack_columns(x.dout_panels.data(), x.dout.data(), v_steps, s.v_head_dim, t.rows, row_steps);
    __builtin_memset(x.dq.data(), 0, t.rows * dk_width_ * sizeof(float));
  }

  void add_sink_gradients(const Task& t, const W& x, double* dsinks) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      const float lse = p_.lse[lse_at(t, r)], sink = p_.mask.sinks[t.kv_head * group_ + r % group_];
      if (lse != kNegInf) dsinks[r % group_] -= __builtin_expf(sink - lse) * x.delta.data()[r];
    }
  }

  // Adds p * dp of the keys [first, last] to the rows' deltas.
  void sum_delta(const Task& t, W& x, int64_t first, int64_t last) const {
    for (int64_t key0 = first; key0 <= last; key0 += kKeys) {
      const int64_t count = min64(kKeys, last + 1 - key0);
      load_keys(t, x, key0, count);
      for (int64_t row0 = 0; row0 < t.rows; row0 += kSubRows) {
        const int64_t rows = min64(kSubRows, t.rows - row0);
        const TileView view =
            view_tile(p_.mask, t, group_, view_rows(p_.mask, t, group_, row0, rows), key0, count, kPanel);
        if (view.end == 0) continue;
        products(x, row0, rows, view);
        for (int64_t r = 0; r < rows; ++r) {
          float *p = x.p.data() + r * kKeys, *dp = x.ds.data() + r * kKeys;
          ready_scores(p_.mask, bias_row(p_.mask, t, group_, row0 + r, key0), view.begin, view.stop, p);
          if (view.partial)
            mask_scores(p_.mask, t, group_, t.first_query + (row0 + r) / group_, (row0 + r) % group_, key0, view, p);
          vf sum = zero();
          for (int64_t c = view.begin; c < view.end; c += kLanes) {
            const vf e = fma(load(p + c), set1(exponent_factor(p_.mask)), set1(-x.lse.data()[row0 + r]));
            sum = fma(exp2_nonpositive(e), load(dp + c), sum);
          }
          x.delta.data()[row0 + r] += reduce_sum(sum);
        }
      }
    }
  }

  // Of a sub-block: its raw scores in x.p, dout . v in x.ds.
  void products(W& x, int64_t row0, int64_t rows, const TileView& view) const {
    const int64_t k_steps = steps_of<Product>(p_.shape.head_dim), v_steps = steps_of<Product>(p_.shape.v_head_dim);
    const int64_t begin = view.begin, panels = (view.stop - begin) / kPanel;
    multiply_panels<Product, true>(rows, panels, k_steps, x.q.data() + row0 * k_steps, k_steps,
                                   x.k_by_dim.data() + begin * k_steps, kPanel * k_steps, x.p.data() + begin, kKeys,
                                   false);
    multiply_panels<Product, true>(rows, panels, v_steps, x.dout.data() + row0 * v_steps, v_steps,
                                   x.v_by_dim.data() + begin * v_steps, kPanel * v_steps, x.ds.data() + begin, kKeys,
                                   false);
  }

  // Rows (rows, dim) as B panels of (row_steps, kPanel). Panels are row_steps apart whatever the number of rows.
  static void pack_columns(float* out, const float* rows, int64_t stride, int64_t dim, int64_t count, int64_t steps) {
    for (int64_t j = 0; j < dim; j += kPanel)
      pack_rows<kPanel>(out + j * steps, min64(kPanel, dim - j), count,
                        [&](int64_t r) { return rows + r * stride + j; });
  }
  static void pack_columns(uint32_t* out, const uint32_t* rows, int64_t stride, int64_t dim, int64_t count,
                           int64_t steps) {
    for (int64_t j = 0; j < dim; j += kPanel)
      pack_rows<kPanel>(out + j * steps, min64(kPanel, dim - j), count,
                        [&](int64_t r) { return reinterpret_cast<const bf16*>(rows + r * stride) + j; });
  }

  // One block of queries against the keys [key0, key0 + count).
  void one_tile(const Task& t, W& x, int64_t key0, int64_t count, float* dk, float* dv, double* dbias) const {
    const int64_t row_steps = steps_of<Product>(x.rows), key_steps = steps_of<Product>(kKeys);
    bool loaded = false;
    for (int64_t row0 = 0; row0 < t.rows; row0 += kSubRows) {
      const int64_t rows = min64(kSubRows, t.rows - row0);
      const TileView view =
          view_tile(p_.mask, t, group_, view_rows(p_.mask, t, group_, row0, rows), key0, count, kPanel);
      if (view.end == 0) continue;
      if (!loaded) {
        load_keys(t, x, key0, count);
        loaded = true;
      }
      const int64_t begin = view.begin, end = view.stop, keys = view.end - begin;
      float *p = x.p.data(), *ds = x.ds.data();
      products(x, row0, rows, view);
      for (int64_t r = 0; r < rows; ++r) score_gradients(t, x, row0 + r, key0, view, p + r * kKeys, ds + r * kKeys);
      for (int64_t r = 0; dbias && r < rows; ++r) add_bias_gradient(t, row0 + r, key0, view, ds + r * kKeys, dbias);

      const Elem *p_columns, *ds_columns, *ds_rows;  // operands: p^T, ds^T (steps are queries) and ds (steps are keys)
      if constexpr (Product::kStep == 1) {
        p_columns = p, ds_columns = ds, ds_rows = ds;
      } else {
        for (int64_t r = 0; r < rows; r += 2) {
          const bool odd = r + 1 < rows;
          pair_rows(p + r * kKeys, odd ? p + (r + 1) * kKeys : nullptr, begin, end, x.p_pairs.data() + r / 2 * kKeys);
          pair_rows(ds + r * kKeys, odd ? ds + (r + 1) * kKeys : nullptr, begin, end,
                    x.ds_pairs.data() + r / 2 * kKeys);
        }
        bf16* to = reinterpret_cast<bf16*>(x.ds_rows.data());
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = begin; c < end; c += kLanes) store_operand(to + r * kKeys + c, load(ds + r * kKeys + c));
        p_columns = x.p_pairs.data(), ds_columns = x.ds_pairs.data(), ds_rows = x.ds_rows.data();
      }
      const int64_t q_at = row0 / Product::kStep * kPanel, sub_steps = steps_of<Product>(rows);
      multiply_panels<Product, false>(keys, dv_width_ / kPanel, sub_steps, p_columns + begin, kKeys,
                                      x.dout_panels.data() + q_at, row_steps * kPanel, dv + begin * dv_width_,
                                      dv_width_, true);
      multiply_panels<Product, false>(keys, dk_width_ / kPanel, sub_steps, ds_columns + begin, kKeys,
                                      x.q_panels.data() + q_at, row_steps * kPanel, dk + begin * dk_width_, dk_width_,
                                      true);
      multiply_panels<Product, true>(rows, dk_width_ / kPanel, steps_of<Product>(keys),
                                     ds_rows + begin / Product::kStep, kKeys / Product::kStep,
                                     x.k_by_key.data() + begin / Product::kStep * kPanel, key_steps * kPanel,
                                     x.dq.data() + row0 * dk_width_, dk_width_, true);
    }
  }

  void load_keys(const Task& t, W& x, int64_t key0, int64_t count) const {
    const AttentionShape& s = p_.shape;
    const int64_t k_steps = steps_of<Product>(s.head_dim), v_steps = steps_of<Product>(s.v_head_dim);
    tile_rows(s, t, p_.k, p_.dtype, p_.k_strides, nullptr, s.head_dim, key0, count, x.k_copy.data(), x.k_rows);
    tile_rows(s, t, p_.v, p_.dtype, p_.v_strides, nullptr, s.v_head_dim, key0, count, x.v_copy.data(), x.v_rows);
    for (int64_t c = 0; c < count; c += kPanel) {
      pack_panel(x.k_by_dim.data() + c * k_steps, x.k_rows, c, min64(kPanel, count - c), s.head_dim);
      pack_panel(x.v_by_dim.data() + c * v_steps, x.v_rows, c, min64(kPanel, count - c), s.v_head_dim);
    }
    for (int64_t j = 0; j < s.head_dim; j += kPanel)
      pack_keys(x.k_by_key.data() + j * steps_of<Product>(kKeys), x.k_rows, j, min64(kPanel, s.head_dim - j), count);
  }

  // In: raw scores in p, dout . v in ds. Out: probabilities and gradients of the scaled scores (without the scale).
  void score_gradients(const Task& t, const W& x, int64_t r, int64_t key0, const TileView& view, float* p,
                       float* ds) const {
    const int64_t begin = view.begin, end = view.stop;
    const float lse = x.lse.data()[r], delta = x.delta.data()[r], factor = exponent_factor(p_.mask);
    ready_scores(p_.mask, bias_row(p_.mask, t, group_, r, key0), begin, end, p);
    if (view.partial) mask_scores(p_.mask, t, group_, t.first_query + r / group_, r % group_, key0, view, p);
    if (p_.mask.softcap <= 0) {
      for (int64_t c = begin; c < end; c += kLanes) {
        const vf prob = exp2_nonpositive(fma(load(p + c), set1(factor), set1(-lse)));
        store(p + c, prob);
        store(ds + c, prob * (load(ds + c) - delta));
      }
      return;
    }
    const float back = 1.f / (p_.mask.softcap * kLog2e);
    for (int64_t c = begin; c < end; c += kLanes) {  // through the cap: 1 - tanh^2; a masked score has no slope
      const vf e = load(p + c), tanh_value = e * back, prob = exp2_nonpositive(e - lse);
      const vf slope = e == kNegInf ? zero() : 1.f - tanh_value * tanh_value;
      store(p + c, prob);
      store(ds + c, prob * (load(ds + c) - delta) * slope);
    }
  }

  // The gradient of a score is that of its bias. What a row does not see has the gradient 0.
  void add_bias_gradient(const Task& t, int64_t r, int64_t key0, const TileView& view, const float* ds,
                         double* dbias) const {
    const BiasRow bias = bias_row(p_.mask, t, group_, r, key0);
    double* to = dbias + r % group_ * bias_width() + bias.reach;
    for (int64_t c = view.begin; c < view.end; ++c) to[bias.index(c)] += ds[c];
  }

  static void pack_panel(float* out, const TileRows<float>& rows, int64_t c, int64_t count, int64_t dim) {
    pack_transposed<kPanel>(out, count, dim, [&](int64_t i) { return rows.row[c + i]; });
  }
  static void pack_panel(uint32_t* out, const TileRows<bf16>& rows, int64_t c, int64_t count, int64_t dim) {
    pack_transposed<kPanel>(out, count, dim, [&](int64_t i) { return rows.row[c + i]; });
  }
  static void pack_keys(float* out, const TileRows<float>& rows, int64_t d, int64_t width, int64_t count) {
    pack_rows<kPanel>(out, width, count, [&](int64_t i) { return rows.row[i] + d; });
  }
  static void pack_keys(uint32_t* out, const TileRows<bf16>& rows, int64_t d, int64_t width, int64_t count) {
    pack_rows<kPanel>(out, width, count, [&](int64_t i) { return rows.row[i] + d; });
  }

  // Writes one KV head's dk and dv, summed over `splits` accumulators in order (the sum is left in the first).
  void write_keys(int64_t index, float* acc, int64_t splits, int64_t stride) const {
    const int64_t b = index / p_.shape.kv_heads, kv_head = index % p_.shape.kv_heads;
    const Sequence seq = sequence(p_.shape, b);
    float *dk = acc, *dv = acc + max_k_ * dk_width_;
    for (int64_t split = 1; split < splits; ++split) {
      const float *other_dk = acc + split * stride, *other_dv = other_dk + max_k_ * dk_width_;
      for (int64_t i = 0; i < seq.num_k * dk_width_; i += kLanes) store(dk + i, load(dk + i) + load(other_dk + i));
      for (int64_t i = 0; i < seq.num_k * dv_width_; i += kLanes) store(dv + i, load(dv + i) + load(other_dv + i));
    }
    for (int64_t j = 0; j < seq.num_k; ++j) {
      const auto offset = [&](const RowStrides& s) {
        return b * s.batch + (seq.k_start + j) * s.row + kv_head * s.head;
      };
      row_from_float(dk + j * dk_width_, p_.dtype, p_.shape.head_dim, p_.mask.scale,
                     const_cast<void*>(at(p_.dk, p_.dtype, offset(p_.dk_strides))));
      row_from_float(dv + j * dv_width_, p_.dtype, p_.shape.v_head_dim, 1.f,
                     const_cast<void*>(at(p_.dv, p_.dtype, offset(p_.dv_strides))));
    }
  }

  // Query blocks of a KV head are shared among this many tasks when there are fewer heads than two for each thread.
  static int64_t splits(const AttentionShape& s, int64_t threads) {
    const int64_t heads = s.batch * s.kv_heads;
    return heads == 0 || heads >= 2 * threads ? 1 : (2 * threads + heads - 1) / heads;
  }
  // Smaller blocks when a share would have fewer than eight of them.
  int64_t queries_per_block() const {
    int64_t rows = kBlockRows, longest = 0;
    for (int64_t b = 0; b < p_.shape.batch; ++b) longest = max64(longest, sequence(p_.shape, b).num_q);
    while (splits_ > 1 && rows > kSubRows && longest * group_ / rows < 8 * splits_) rows -= kSubRows;
    return max64(1, rows / group_);
  }

  const AttentionBackwardParams& p_;
  const Parallel& par_;
  const int64_t group_, splits_, queries_, dk_width_, dv_width_;
  int64_t max_k_ = 0;
};

}  // namespace

void attention_backward(const AttentionBackwardParams& p, const Parallel& par) {
  if constexpr (kHasBf16Dot) {
    if (p.dtype == DType::bf16) {
      Backward<ProductBf16>(p, par).run();
      return;
    }
  }
  Backward<ProductF32>(p, par).run();
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
