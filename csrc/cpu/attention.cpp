// The forward pass: online softmax over tiles of keys, split over the keys when there are too few tasks to go round.
#include "llmcore/attention.h"

#include "attention_decode.h"
#include "attention_tile.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// What a task holds, in 32-bit elements: queries and accumulators of its rows, which pass once for every block of keys,
// and the packed keys and values of a block. Together 640 KiB of an L2 of 1 MiB.
constexpr int64_t kTaskElems = 64 * 1024, kPackedElems = 96 * 1024;
constexpr int64_t kTaskRows = 32 * kTileRows;
constexpr int64_t kMinSplitKeys = 256;

template <class Product>
struct Worker {
  using Elem = typename Product::Elem;
  Scratch<Elem> q, k_packed, v_packed;
  Scratch<float> acc, highest, total, scores, k_copy, v_copy;
  Scratch<bf16> p;       // probabilities of a tile for the bf16 product
  Scratch<bool> packed;  // of each tile of a block of keys: whether it has been packed
  TileRows<typename Product::Value> k_rows, v_rows;

  Worker(const AttentionShape& s, int64_t rows, int64_t keys)
      : q(rows * steps_of<Product>(round_up(s.head_dim, kLanes))),
        k_packed(keys * steps_of<Product>(s.head_dim)),
        v_packed(round_up(s.v_head_dim, kPanel) * steps_of<Product>(keys)),
        acc(rows * round_up(s.v_head_dim, kPanel)),
        highest(rows + kLanes),
        total(rows + kLanes),
        scores(kTileRows * kMaxKeys),
        k_copy(kMaxKeys * s.head_dim),
        v_copy(kMaxKeys * s.v_head_dim),
        p(kTileRows * kMaxKeys),
        packed(keys / kPanel) {}
};

template <class Product>
class Forward {
  using Elem = typename Product::Elem;

 public:
  Forward(const AttentionParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        group_(p.shape.heads / p.shape.kv_heads),
        acc_width_(round_up(p.shape.v_head_dim, kPanel)),
        q_steps_(steps_of<Product>(round_up(p.shape.head_dim, kLanes))),
        tile_keys_(keys_per_tile()),
        block_keys_(keys_per_block()),
        queries_(queries_per_task()),
        tasks_(p.shape, queries_) {}

  void run() {
    const int64_t splits = choose_splits();
    if (splits == 1) {
      Workers workers(*this);
      parallel_own_tasks(par_, tasks_.size(), [&](int64_t i, int64_t w) {
        const Task t = tasks_[i];
        auto& x = workers[w];
        const KeyRange keys = task_keys(t);
        attend(t, x, keys.first, keys.last + 1, true, false, [&](const Rows& rows) {
          write_rows(p_, t, group_, rows.first, rows.count, rows.acc, acc_width_, rows.highest, rows.total);
        });
      });
      return;
    }
    // Each split leaves its accumulator, maximum and sum; the second pass joins them in a fixed order.
    const int64_t rows = queries_ * group_, stride = rows * (acc_width_ + 2);
    Scratch<float> partial(tasks_.size() * splits * stride);
    {
      Workers workers(*this);
      parallel_tasks(par_, tasks_.size() * splits, [&](int64_t i, int64_t w) {
        const Task t = tasks_[i / splits];
        const int64_t split = i % splits;
        auto& x = workers[w];
        const KeyRange keys = task_keys(t);
        const int64_t tiles = (keys.last - keys.first + tile_keys_) / tile_keys_;
        const int64_t first = keys.first + tiles * split / splits * tile_keys_;
        const int64_t last = keys.first + tiles * (split + 1) / splits * tile_keys_;
        attend(t, x, first, min64(last, keys.last + 1), split == 0, true, [](const Rows&) {});
        float* to = partial.data() + i * stride;
        __builtin_memcpy(to, x.acc.data(), t.rows * acc_width_ * sizeof(float));
        __builtin_memcpy(to + rows * acc_width_, x.highest.data(), t.rows * sizeof(float));
        __builtin_memcpy(to + rows * (acc_width_ + 1), x.total.data(), t.rows * sizeof(float));
      });
    }
    parallel_tasks(par_, tasks_.size(), [&](int64_t i, int64_t) {
      const Task t = tasks_[i];
      float* first = partial.data() + i * splits * stride;
      float *highest = first + rows * acc_width_, *total = highest + rows;
      for (int64_t split = 1; split < splits; ++split) {
        const float* other = first + split * stride;
        for (int64_t r = 0; r < t.rows; ++r)
          join_rows(first + r * acc_width_, highest[r], total[r], other + r * acc_width_, other[rows * acc_width_ + r],
                    other[rows * (acc_width_ + 1) + r], acc_width_);
      }
      write_rows(p_, t, group_, 0, t.rows, first, acc_width_, highest, total);
    });
  }

 private:
  // One Worker for each worker index, made on first use by the thread that uses it.
  class Workers {
   public:
    explicit Workers(const Forward& f) : f_(f), all_(f.par_.threads) {
      for (int i = 0; i < f.par_.threads; ++i) all_.data()[i] = nullptr;
    }
    ~Workers() {
      for (int i = 0; i < f_.par_.threads; ++i) delete all_.data()[i];
    }
    Worker<Product>& operator[](int64_t w) {
      auto& x = all_.data()[w];
      if (!x) x = new Worker<Product>(f_.p_.shape, f_.queries_ * f_.group_, f_.block_keys_);
      return *x;
    }

   private:
    const Forward& f_;
    Scratch<Worker<Product>*> all_;
  };

  int64_t queries_per_task() const {
    const AttentionShape& s = p_.shape;
    constexpr int64_t kStep = 4 * kTileRows;
    int64_t rows = max64(kStep, min64(kTaskElems / (q_steps_ + acc_width_) / kStep * kStep, kTaskRows));
    // Where the window lets all keys of a task fit one block, its rows need not be held, and a larger task packs fewer
    // keys that its neighbours pack too.
    if (p_.mask.window > 0 && p_.mask.window < block_keys_) {
      const int64_t queries = block_keys_ - (p_.mask.causal ? 1 : 2) * p_.mask.window;
      rows = max64(rows, min64(queries * group_ / kStep * kStep, 2 * kTaskRows));
    }
    // Smaller tasks when there would be fewer than eight for each thread: with 64 threads the last ones then end within
    // 2 % of each other (bench/balance.py).
    const int64_t total = (s.cu_q ? s.cu_q[s.batch] : s.batch * s.seq_q) * s.heads;
    while (rows > kStep && total / rows < 8 * par_.threads) rows -= kStep;
    return max64(1, rows / group_);
  }

  int64_t choose_splits() const {
    const int64_t tasks = tasks_.size();
    if (tasks == 0 || tasks >= par_.threads) return 1;
    return max64(1, min64((2 * par_.threads + tasks - 1) / tasks, longest_keys() / kMinSplitKeys));
  }

  // The union of what the task's rows see by position.
  KeyRange task_keys(const Task& t) const {
    const KeyRange a = visible_keys(p_.mask, t.seq, t.first_query);
    const KeyRange z = visible_keys(p_.mask, t.seq, t.first_query + t.rows / group_ - 1);
    return {a.first, max64(z.last, a.first - 1)};
  }

  // Not more than a block of the mask, so that hidden ones are skipped.
  int64_t keys_per_tile() const { return p_.mask.block_mask && p_.mask.block_k < kMaxKeys ? kMaxKeys / 2 : kMaxKeys; }

  int64_t keys_per_block() const {
    const int64_t of_key = steps_of<Product>(p_.shape.head_dim) + acc_width_ / Product::kStep;
    return max64(1, min64(kPackedElems / of_key / tile_keys_, (longest_keys() + tile_keys_ - 1) / tile_keys_)) *
           tile_keys_;
  }

  int64_t longest_keys() const {
    int64_t longest = 0;
    for (int64_t b = 0; b < p_.shape.batch; ++b) longest = max64(longest, sequence(p_.shape, b).num_k);
    return longest;
  }

  // Rows [first, first + count) of a task, up to kTileRows, and what the worker holds of them.
  struct Rows {
    int64_t first, count;
    Elem* q;
    float *acc, *highest, *total;
    bool fresh;  // acc holds nothing yet, not even zeros
    RowsView seen;
  };

  // Takes keys [first, last) into account, block by block; done(rows) once some rows have seen them all. With `keep`
  // the rows stay where the worker holds them; else, of a single block, those that are done make room in L1.
  template <class Done>
  void attend(const Task& t, Worker<Product>& x, int64_t first, int64_t last, bool with_sink, bool keep,
              const Done& done) const {
    keep = keep || last - first > block_keys_;
    int64_t block = first;
    do {
      const int64_t end = min64(block + block_keys_, last);
      for (int64_t i = 0; i < block_keys_ / tile_keys_; ++i) x.packed.data()[i] = false;
      for (int64_t row0 = 0; row0 < t.rows; row0 += kTileRows) {
        const int64_t count = min64(kTileRows, t.rows - row0), slot = keep ? row0 : 0;
        Rows rows{row0,
                  count,
                  x.q.data() + slot * q_steps_,
                  x.acc.data() + slot * acc_width_,
                  x.highest.data() + slot,
                  x.total.data() + slot,
                  block == first,
                  view_rows(p_.mask, t, group_, row0, count)};
        if (block == first) begin(t, rows, with_sink);
        if (end >= last) fetch_out(t, rows);
        for (int64_t key0 = block; key0 < end; key0 += tile_keys_)
          tile(t, x, rows, block, key0, min64(tile_keys_, end - key0));
        if (rows.fresh) __builtin_memset(rows.acc, 0, count * acc_width_ * sizeof(float));
        if (end >= last) done(rows);
      }
      block += block_keys_;
    } while (block < last);
  }

  void begin(const Task& t, const Rows& rows, bool with_sink) const {
    const auto q_row = [&](TaskRow row) { return at(p_.q, p_.q_dtype, row.offset(t, group_, p_.q_strides)); };
    for_task_rows(t, group_, rows.first, rows.count, [&](int64_t i, TaskRow row) {
      load_row<Product>(q_row(row), p_.q_dtype, p_.shape.head_dim, q_steps_, rows.q + i * q_steps_);
      begin_row(p_.mask, t.kv_head * group_ + row.head, with_sink, rows.highest[i], rows.total[i]);
    });
    // The rows that come next are fetched while these meet their keys.
    const int64_t next = rows.first + rows.count;
    for_task_rows(t, group_, next, min64(kTileRows, t.rows - next), [&](int64_t, TaskRow row) {
      const char* bytes = static_cast<const char*>(q_row(row));
      for (int64_t i = 0; i < p_.shape.head_dim * element_size(p_.q_dtype); i += 64) __builtin_prefetch(bytes + i);
    });
  }

  // The lines of out that these rows will be written to, while they meet their last keys.
  void fetch_out(const Task& t, const Rows& rows) const {
    for_task_rows(t, group_, rows.first, rows.count, [&](int64_t, TaskRow row) {
      const char* bytes = static_cast<const char*>(at(p_.out, p_.q_dtype, row.offset(t, group_, p_.out_strides)));
      for (int64_t i = 0; i < p_.shape.v_head_dim * element_size(p_.q_dtype); i += 64) __builtin_prefetch(bytes + i, 1);
    });
  }

  // Rows meet the keys [key0, key0 + count) of the block that starts at key `block`.
  void tile(const Task& t, Worker<Product>& x, Rows& rows, int64_t block, int64_t key0, int64_t count) const {
    const TileView view = view_tile(p_.mask, t, group_, rows.seen, key0, count, kLanes);
    if (view.end == 0) return;
    const int64_t k_steps = steps_of<Product>(p_.shape.head_dim);
    Elem *k = x.k_packed.data() + (key0 - block) * k_steps,
         *v = x.v_packed.data() + (key0 - block) / Product::kStep * acc_width_;
    bool& packed = x.packed.data()[(key0 - block) / tile_keys_];
    if (!packed) load_tile(t, x, key0, count, k, v);
    packed = true;
    float* scores = x.scores.data();
    multiply_columns<Product>(rows.count, view.begin, view.stop, k_steps, rows.q, q_steps_, k, scores, tile_keys_);
    if (view.partial || ready_first(p_.mask)) ready_and_mask(t, rows, key0, view, scores);
    typename Product::Value* weights = probabilities(x);
    softmax_tile(exponent_factor(p_.mask), rows.count, view.begin, view.stop, tile_keys_, scores, weights, rows.highest,
                 rows.total, rows.acc, acc_width_);
    // acc += weights * v
    multiply_panels<Product, true>(rows.count, acc_width_ / kPanel, steps_of<Product>(view.end - view.begin),
                                   static_cast<const Elem*>(static_cast<const void*>(weights + view.begin)),
                                   tile_keys_ / Product::kStep, v + view.begin / Product::kStep * kPanel,
                                   steps_of<Product>(count) * kPanel, rows.acc, acc_width_, !rows.fresh);
    rows.fresh = false;
  }

  void ready_and_mask(const Task& t, const Rows& rows, int64_t key0, const TileView& view, float* scores) const {
    for_task_rows(t, group_, rows.first, rows.count, [&](int64_t i, TaskRow row) {
      float* line = scores + i * tile_keys_;
      ready_scores(p_.mask, bias_row(p_.mask, t, group_, rows.first + i, key0), view.begin, view.stop, line);
      if (view.partial) mask_scores(p_.mask, t, group_, row.query, row.head, key0, view, line);
    });
  }

  // Where the probabilities of a tile go: over its scores, or beside them as bf16.
  static float* probabilities(Worker<ProductF32>& x) { return x.scores.data(); }
  static bf16* probabilities(Worker<ProductBf16>& x) { return x.p.data(); }

  void load_tile(const Task& t, Worker<Product>& x, int64_t key0, int64_t count, Elem* k, Elem* v) const {
    const AttentionShape& s = p_.shape;
    tile_rows(s, t, p_.k, p_.kv_dtype, p_.k_strides, p_.k_scale, s.head_dim, key0, count, x.k_copy.data(), x.k_rows);
    tile_rows(s, t, p_.v, p_.kv_dtype, p_.v_strides, p_.v_scale, s.v_head_dim, key0, count, x.v_copy.data(), x.v_rows);
    for (int64_t i = 0; i < count; ++i)  // while the keys are packed
      for (int64_t c = 0; c < s.v_head_dim * static_cast<int64_t>(sizeof(*x.v_rows.row[i])); c += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x.v_rows.row[i]) + c);
    for (int64_t c = 0; c < count; c += kPanel)
      pack_panel(k + c * steps_of<Product>(s.head_dim), x.k_rows, c, min64(kPanel, count - c), s.head_dim);
    pack_values(v, x.v_rows, s.v_head_dim, count);
  }

  static void pack_panel(float* out, const TileRows<float>& rows, int64_t c, int64_t count, int64_t dim) {
    pack_transposed<kPanel>(out, count, dim, [&](int64_t i) { return rows.row[c + i]; });
  }
  static void pack_panel(uint32_t* out, const TileRows<bf16>& rows, int64_t c, int64_t count, int64_t dim) {
    pack_transposed<kPanel>(out, count, dim, [&](int64_t i) { return rows.row[c + i]; });
  }
  static void pack_values(float* out, const TileRows<float>& rows, int64_t dim, int64_t count) {
    pack_rows<kPanel>(out, dim, count, [&](int64_t i) { return rows.row[i]; });
  }
  static void pack_values(uint32_t* out, const TileRows<bf16>& rows, int64_t dim, int64_t count) {
    pack_rows<kPanel>(out, dim, count, [&](int64_t i) { return rows.row[i]; });
  }

  const AttentionParams& p_;
  const Parallel& par_;
  const int64_t group_, acc_width_, q_steps_, tile_keys_, block_keys_, queries_;
  const TaskList tasks_;
};

}  // namespace

void attention_forward(const AttentionParams& p, const Parallel& par) {
  attention_decode(p, par);
  if constexpr (kHasBf16Dot) {
    if (use_bf16_product(p.q_dtype, p.kv_dtype)) {
      Forward<ProductBf16>(p, par).run();
      return;
    }
  }
  Forward<ProductF32>(p, par).run();
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
