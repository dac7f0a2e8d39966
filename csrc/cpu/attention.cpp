// The forward pass: online softmax over tiles of keys, split over the keys when there are too few tasks to go round.
#include "llmcore/attention.h"

#include "attention_decode.h"
#include "attention_tile.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// Working set of a task in floats (q, accumulator): about half of a 512 KiB L2.
constexpr int64_t kTaskFloats = 64 * 1024;
constexpr int64_t kMinSplitKeys = 256;

template <class Product>
struct Worker {
  using Elem = typename Product::Elem;
  Scratch<Elem> q, k_packed, v_packed;
  Scratch<float> acc, highest, total, scores, k_copy, v_copy;
  Scratch<bf16> p;  // probabilities of a sub-block for the bf16 product
  TileRows<typename Product::Value> k_rows, v_rows;

  Worker(const AttentionShape& s, int64_t rows)
      : q(rows * steps_of<Product>(round_up(s.head_dim, kLanes))),
        k_packed(kKeys * steps_of<Product>(s.head_dim)),
        v_packed(round_up(s.v_head_dim, kPanel) * steps_of<Product>(kKeys)),
        acc(rows * round_up(s.v_head_dim, kPanel)),
        highest(rows),
        total(rows),
        scores(kSubRows * kKeys),
        k_copy(kKeys * s.head_dim),
        v_copy(kKeys * s.v_head_dim),
        p(kSubRows * kKeys) {}
};

template <class Product>
class Forward {
 public:
  Forward(const AttentionParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        group_(p.shape.heads / p.shape.kv_heads),
        acc_width_(round_up(p.shape.v_head_dim, kPanel)),
        q_steps_(steps_of<Product>(round_up(p.shape.head_dim, kLanes))),
        queries_(queries_per_task()),
        tasks_(p.shape, queries_) {}

  void run() {
    const int64_t splits = choose_splits();
    if (splits == 1) {
      Workers workers(*this);
      parallel_tasks(par_, tasks_.size(), [&](int64_t i, int64_t w) {
        const Task t = tasks_[i];
        auto& x = workers[w];
        begin(t, x, true);
        const KeyRange keys = task_keys(t);
        attend(t, x, keys.first, keys.last + 1);
        write_rows(p_, t, group_, x.acc.data(), acc_width_, x.highest.data(), x.total.data());
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
        begin(t, x, split == 0);
        const KeyRange keys = task_keys(t);
        const int64_t tiles = (keys.last - keys.first + kKeys) / kKeys;
        const int64_t first = keys.first + tiles * split / splits * kKeys;
        const int64_t last = keys.first + tiles * (split + 1) / splits * kKeys;
        attend(t, x, first, min64(last, keys.last + 1));
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
      write_rows(p_, t, group_, first, acc_width_, highest, total);
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
      if (!x) x = new Worker<Product>(f_.p_.shape, f_.queries_ * f_.group_);
      return *x;
    }

   private:
    const Forward& f_;
    Scratch<Worker<Product>*> all_;
  };

  int64_t queries_per_task() const {
    const AttentionShape& s = p_.shape;
    int64_t rows = kTaskFloats / (s.head_dim + s.v_head_dim) / kSubRows * kSubRows;
    rows = max64(kSubRows, min64(rows, 8 * kSubRows));
    // Smaller tasks when there would be fewer than eight for each thread: with 64 threads the last ones then end within
    // 2 % of each other (bench/balance.py).
    const int64_t total = (s.cu_q ? s.cu_q[s.batch] : s.batch * s.seq_q) * s.heads;
    while (rows > kSubRows && total / rows < 8 * par_.threads) rows -= kSubRows;
    return max64(1, rows / group_);
  }

  int64_t choose_splits() const {
    const int64_t tasks = tasks_.size();
    if (tasks == 0 || tasks >= par_.threads) return 1;
    int64_t longest = 0;
    for (int64_t b = 0; b < p_.shape.batch; ++b) longest = max64(longest, sequence(p_.shape, b).num_k);
    return max64(1, min64((2 * par_.threads + tasks - 1) / tasks, longest / kMinSplitKeys));
  }

  // The union of what the task's rows see by position.
  KeyRange task_keys(const Task& t) const {
    const KeyRange a = visible_keys(p_.mask, t.seq, t.first_query);
    const KeyRange z = visible_keys(p_.mask, t.seq, t.first_query + t.rows / group_ - 1);
    return {a.first, max64(z.last, a.first - 1)};
  }

  void begin(const Task& t, Worker<Product>& x, bool with_sink) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      load_row<Product>(at(p_.q, p_.q_dtype, row_offset(t, group_, r, p_.q_strides)), p_.q_dtype, p_.shape.head_dim,
                        q_steps_, x.q.data() + r * q_steps_);
      begin_row(p_.mask, t.kv_head * group_ + r % group_, with_sink, x.highest.data()[r], x.total.data()[r]);
    }
    __builtin_memset(x.acc.data(), 0, t.rows * acc_width_ * sizeof(float));
  }

  // Takes keys [first, last) into account.
  void attend(const Task& t, Worker<Product>& x, int64_t first, int64_t last) const {
    const AttentionShape& s = p_.shape;
    for (int64_t key0 = first; key0 < last; key0 += kKeys) {
      const int64_t count = min64(kKeys, last - key0);
      bool loaded = false;
      for (int64_t row0 = 0; row0 < t.rows; row0 += kSubRows) {
        const int64_t rows = min64(kSubRows, t.rows - row0);
        const TileView view = view_tile(p_.mask, t, group_, row0, rows, key0, count);
        if (view.end == 0) continue;
        if (!loaded) {
          load_tile(t, x, key0, count);
          loaded = true;
        }
        const int64_t panel0 = view.begin / kPanel, end = round_up(view.end, kPanel),
                      k_steps = steps_of<Product>(s.head_dim);
        float* scores = x.scores.data();
        multiply_panels<Product, true>(rows, end / kPanel - panel0, k_steps, x.q.data() + row0 * q_steps_, q_steps_,
                                       x.k_packed.data() + panel0 * kPanel * k_steps, kPanel * k_steps,
                                       scores + view.begin, kKeys, false);
        for (int64_t r = 0; r < rows; ++r) {
          float *line = scores + r * kKeys, *acc = x.acc.data() + (row0 + r) * acc_width_;
          ready_scores(p_.mask, bias_row(p_.mask, t, group_, row0 + r, key0), view.begin, end, line);
          if (view.partial) mask_scores(p_.mask, t, group_, row0 + r, key0, view, line);
          softmax_row(exponent_factor(p_.mask), view.begin, end, line, x.highest.data()[row0 + r],
                      x.total.data()[row0 + r], acc, acc_width_);
        }
        add_values(x, row0, rows, view, steps_of<Product>(count));
      }
    }
  }

  void load_tile(const Task& t, Worker<Product>& x, int64_t key0, int64_t count) const {
    const AttentionShape& s = p_.shape;
    tile_rows(s, t, p_.k, p_.kv_dtype, p_.k_strides, p_.k_scale, s.head_dim, key0, count, x.k_copy.data(), x.k_rows);
    tile_rows(s, t, p_.v, p_.kv_dtype, p_.v_strides, p_.v_scale, s.v_head_dim, key0, count, x.v_copy.data(), x.v_rows);
    const int64_t k_steps = steps_of<Product>(s.head_dim);
    for (int64_t c = 0; c < count; c += kPanel)
      pack_panel(x.k_packed.data() + c * k_steps, x.k_rows, c, min64(kPanel, count - c), s.head_dim);
    pack_values(x.v_packed.data(), x.v_rows, s.v_head_dim, count);
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

  // acc += p * v for a sub-block; p is in x.scores.
  void add_values(Worker<Product>& x, int64_t row0, int64_t rows, const TileView& view, int64_t v_steps) const {
    const float* scores = x.scores.data();
    float* acc = x.acc.data() + row0 * acc_width_;
    if constexpr (Product::kStep == 1) {
      multiply_panels<Product, true>(rows, acc_width_ / kPanel, view.end - view.begin, scores + view.begin, kKeys,
                                     x.v_packed.data() + view.begin * kPanel, v_steps * kPanel, acc, acc_width_, true);
    } else {
      bf16* p = x.p.data();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = view.begin; c < round_up(view.end, kPanel); c += kLanes)
          store(p + r * kKeys + c, load(scores + r * kKeys + c));
      multiply_panels<Product, true>(rows, acc_width_ / kPanel, steps_of<Product>(view.end - view.begin),
                                     reinterpret_cast<const uint32_t*>(p + view.begin), kKeys / 2,
                                     x.v_packed.data() + view.begin / 2 * kPanel, v_steps * kPanel, acc, acc_width_,
                                     true);
    }
  }

  const AttentionParams& p_;
  const Parallel& par_;
  const int64_t group_, acc_width_, q_steps_, queries_;
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
