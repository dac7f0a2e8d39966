// A decode step in one call from Python (llmcore/inference/decoder.py, which owns every tensor that is pointed to).
#include "llmcore/decoder.h"

#include <pybind11/pybind11.h>

#include "common.h"
#include "decoder.h"
#include "llmcore/attention.h"
#include "llmcore/linear.h"
#include "llmcore/norm.h"
#include "llmcore/qk_norm_rope.h"
#include "quant_format.h"

namespace py = pybind11;

namespace llmcore {
namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void product(const Matrix& w, DType dtype, int64_t rows, const void* x, void* y, const Parallel& par) {
  int64_t begin = 0;
  for (const MatrixPart& part : w.parts) {
    const int64_t skip = begin * bytes_of(dtype);
    const void* bias = w.bias ? static_cast<const char*>(w.bias) + skip : nullptr;
    if (part.quantized)
      cpu::quantized_linear({dtype, part.format, rows, part.rows, w.k, x, w.k, static_cast<const uint8_t*>(part.weight),
                             bias, static_cast<char*>(y) + skip, w.n},
                            par);
    else
      cpu::linear({dtype, rows, w.n, w.k, x, w.k, part.weight, w.k, bias, y}, par);
    begin += part.rows;
  }
}

}  // namespace

// Rows of one step, each (tokens, its width) of the model's dtype.
struct Decoder::Buffers {
  void *stream, *next_stream;  // the residual stream, and where the next sum goes
  void *branch, *normed;       // (tokens, dim): what a sublayer gave, and what the next one gets
  void *qkv, *q, *attended, *gate_up, *hidden;
  float* rstd;  // (tokens)
};

void Decoder::check(const DecoderStep& s) const {
  const int64_t slots = sizes_.num_blocks * sizes_.block_size;
  LLMCORE_CHECK(s.tokens >= 1 && s.tokens <= kLinearRows, "decoder: ", s.tokens, " tokens; accepted: 1 to ",
                kLinearRows);
  LLMCORE_CHECK(s.cu_q || s.tokens == s.batch, "decoder: ", s.tokens, " tokens of ", s.batch,
                " sequences; without cu_seqlens_q there is one for each");
  for (int64_t t = 0; t < s.tokens; ++t) {
    LLMCORE_CHECK(s.positions[t] >= 0 && s.positions[t] < sizes_.max_positions, "decoder: position ", s.positions[t],
                  " of token ", t, "; accepted: 0 to ", sizes_.max_positions - 1);
    LLMCORE_CHECK(s.slots[t] >= -1 && s.slots[t] < slots, "decoder: slot ", s.slots[t], " of token ", t,
                  "; accepted: -1 to ", slots - 1);
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t capacity = s.table_stride * sizes_.block_size;
    LLMCORE_CHECK(s.kv_lens[b] >= 0 && s.kv_lens[b] <= capacity, "decoder: sequence ", b, " has ", s.kv_lens[b],
                  " keys; accepted: 0 to ", capacity);
    for (int64_t j = 0; j * sizes_.block_size < s.kv_lens[b]; ++j) {
      const int64_t block = s.block_table[b * s.table_stride + j];
      LLMCORE_CHECK(block >= 0 && block < sizes_.num_blocks, "decoder: block ", block, " of sequence ", b,
                    "; accepted: 0 to ", sizes_.num_blocks - 1);
    }
    if (s.cu_q)
      LLMCORE_CHECK(s.cu_q[b] >= 0 && s.cu_q[b] <= s.cu_q[b + 1] && s.cu_q[b + 1] <= s.tokens,
                    "decoder: cu_seqlens_q does not rise from 0 to ", s.tokens);
  }
}

void Decoder::attention(const DecoderLayer& layer, const DecoderStep& s, const Buffers& b, const Parallel& par) const {
  const DecoderSizes& z = sizes_;
  const int64_t row = z.num_kv_heads * z.head_dim, block = z.block_size * row;
  product(layer.qkv, z.dtype, s.tokens, b.normed, b.qkv, par);
  const auto side = [&](void* cache) {
    return CacheSide{z.head_dim, nullptr, {0, 0}, cache, {block, row, z.head_dim}, nullptr, {0, 0, 0}};
  };
  const KvCacheWriteParams write{z.dtype, z.cache_dtype,       s.tokens,           z.num_kv_heads, z.block_size,
                                 s.slots, side(layer.k_cache), side(layer.v_cache)};
  const QkHeads heads{
      z.dtype,       s.tokens,   s.tokens,     z.num_heads,  z.num_kv_heads, z.head_dim, layer.cos ? z.rotary_dim : 0,
      z.interleaved, z.norm_eps, layer.q_norm, layer.k_norm, layer.cos,      layer.sin,  s.positions};
  cpu::qk_norm_rope({heads, b.qkv, layer.qkv.n, b.q, nullptr, nullptr, &write}, par);

  AttentionParams p{};
  p.shape.batch = s.batch;
  p.shape.heads = z.num_heads;
  p.shape.kv_heads = z.num_kv_heads;
  p.shape.head_dim = p.shape.v_head_dim = z.head_dim;
  p.shape.seq_q = s.cu_q ? 0 : 1;
  p.shape.total_q = s.tokens;
  p.shape.cu_q = s.cu_q;
  p.shape.block_table = s.block_table;
  p.shape.table_stride = s.table_stride;
  p.shape.block_size = z.block_size;
  p.shape.kv_lens = s.kv_lens;
  p.mask.scale = z.scale;
  p.mask.softcap = z.softcap;
  p.mask.causal = true;
  p.mask.window = layer.window;
  p.mask.sinks = layer.sinks;
  p.q_dtype = z.dtype;
  p.kv_dtype = z.cache_dtype;
  p.q = b.q;
  p.k = layer.k_cache;
  p.v = layer.v_cache;
  const int64_t token = z.num_heads * z.head_dim;
  p.q_strides = p.out_strides = s.cu_q ? RowStrides{0, token, z.head_dim} : RowStrides{token, 0, z.head_dim};
  p.k_strides = p.v_strides = {block, row, z.head_dim};
  p.out = b.attended;
  cpu::attention_forward(p, par);
  product(layer.out, z.dtype, s.tokens, b.attended, b.branch, par);
}

void Decoder::mlp(const DecoderLayer& layer, int64_t tokens, const Buffers& b, const Parallel& par) const {
  const DecoderSizes& z = sizes_;
  product(layer.gate_up, z.dtype, tokens, b.normed, b.gate_up, par);
  const char* up = static_cast<const char*>(b.gate_up) + z.ffn_dim * bytes_of(z.dtype);
  cpu::glu_forward({z.dtype, z.activation, tokens, z.ffn_dim, b.gate_up, 2 * z.ffn_dim, up, 2 * z.ffn_dim, b.hidden},
                   par);
  product(layer.down, z.dtype, tokens, b.hidden, b.branch, par);
}

void Decoder::step(const DecoderStep& s, const Parallel& par) {
  check(s);
  const DecoderSizes& z = sizes_;
  const int64_t heads = z.num_heads * z.head_dim, kv = z.num_kv_heads * z.head_dim;
  size_t used = 0;
  const auto take = [&](int64_t width, int64_t element) {
    const size_t begin = used;
    used += (s.tokens * width * element + 63) / 64 * 64;
    return begin;
  };
  const int64_t widths[] = {z.dim, z.dim, z.dim, z.dim, heads + 2 * kv, heads, heads, 2 * z.ffn_dim, z.ffn_dim};
  size_t begins[std::size(widths)];
  for (size_t i = 0; i < std::size(widths); ++i) begins[i] = take(widths[i], bytes_of(z.dtype));
  const size_t rstd = take(1, sizeof(float));
  if (scratch_.size() < used + 63) scratch_.resize(used + 63);
  std::byte* base = scratch_.data() + (64 - reinterpret_cast<uintptr_t>(scratch_.data()) % 64) % 64;
  Buffers b{
      base + begins[0], base + begins[1], base + begins[2], base + begins[3], base + begins[4],
      base + begins[5], base + begins[6], base + begins[7], base + begins[8], reinterpret_cast<float*>(base + rstd)};

  const auto norm = [&](const void* x, const void* residual, const void* gain, void* y, void* sum) {
    cpu::rms_norm_forward(
        {z.dtype, s.tokens, z.dim, z.norm_eps, x, z.dim, residual, z.dim, gain, nullptr, y, sum, nullptr, b.rstd}, par);
  };
  const void* stream = s.x;
  bool has_branch = false;                             // of the stream's two addends: the first layer has only one
  const auto enter = [&](const void* gain, void* y) {  // as Block._enter
    if (!has_branch) return norm(stream, nullptr, gain, y, nullptr);
    norm(b.branch, stream, gain, y, b.next_stream);
    stream = b.next_stream;
    std::swap(b.stream, b.next_stream);
  };
  const auto leave = [&](const void* gain) {  // as Block._leave
    has_branch = true;
    if (!gain) return;
    norm(b.branch, nullptr, gain, b.normed, nullptr);
    std::swap(b.branch, b.normed);
  };
  for (const DecoderLayer& layer : layers_) {
    enter(layer.attention_norm, b.normed);
    attention(layer, s, b, par);
    leave(layer.attention_out_norm);
    enter(layer.mlp_norm, b.normed);
    mlp(layer, s.tokens, b, par);
    leave(layer.mlp_out_norm);
  }
  enter(z.last_norm, s.out);
}

namespace {

// Addresses come from Python as integers, 0 for none.
template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

DType dtype_named(const std::string& text) {
  for (DType t : {DType::f32, DType::bf16, DType::f16})
    if (text == name(t)) return t;
  fail("decoder: dtype ", text, "; accepted: float32, bfloat16, float16");
}

Matrix matrix(const py::handle& values) {
  const auto t = values.cast<py::tuple>();  // (n, k, bias, ((format or "", rows, weight), ...))
  Matrix m{t[0].cast<int64_t>(), t[1].cast<int64_t>(), pointer<const void>(t[2]), {}};
  for (const py::handle& item : t[3].cast<py::tuple>()) {
    const auto part = item.cast<py::tuple>();
    const auto format = part[0].cast<std::string>();
    m.parts.push_back({!format.empty(), format.empty() ? QuantFormat::q4_0 : quant_format(format, "decoder"),
                       part[1].cast<int64_t>(), pointer<const void>(part[2])});
  }
  return m;
}

DecoderSizes sizes(const py::dict& d) {
  const auto integer = [&](const char* key) { return d[key].cast<int64_t>(); };
  return {dtype_named(d["dtype"].cast<std::string>()),
          dtype_named(d["cache_dtype"].cast<std::string>()),
          integer("dim"),
          integer("num_heads"),
          integer("num_kv_heads"),
          integer("head_dim"),
          integer("ffn_dim"),
          integer("rotary_dim"),
          integer("block_size"),
          integer("num_blocks"),
          integer("max_positions"),
          d["interleaved"].cast<bool>(),
          d["norm_eps"].cast<float>(),
          d["scale"].cast<float>(),
          d["softcap"].cast<float>(),
          d["activation"].cast<std::string>() == "swiglu" ? Activation::silu : Activation::gelu_tanh,
          pointer<const void>(d["last_norm"])};
}

DecoderLayer layer(const py::dict& d) {
  const auto tensor = [&](const char* key) { return pointer<const void>(d[key]); };
  const auto floats = [&](const char* key) { return pointer<const float>(d[key]); };
  return {tensor("attention_norm"),
          tensor("mlp_norm"),
          tensor("attention_out_norm"),
          tensor("mlp_out_norm"),
          matrix(d["qkv"]),
          matrix(d["out"]),
          matrix(d["gate_up"]),
          matrix(d["down"]),
          tensor("q_norm"),
          tensor("k_norm"),
          floats("cos"),
          floats("sin"),
          d["window"].cast<int64_t>(),
          floats("sinks"),
          pointer<void>(d["k_cache"]),
          pointer<void>(d["v_cache"])};
}

}  // namespace

void add_decoder(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", "The layers of a decoder as one call: csrc/include/llmcore/decoder.h.")
      .def(py::init([](const py::dict& d) { return Decoder(sizes(d)); }))
      .def("add_layer", [](Decoder& self, const py::dict& d) { self.add_layer(layer(d)); })
      .def("step", [](Decoder& self, int64_t tokens, int64_t batch, uintptr_t x, uintptr_t positions, uintptr_t slots,
                      uintptr_t block_table, int64_t table_stride, uintptr_t kv_lens, uintptr_t cu_q, uintptr_t out) {
        const py::gil_scoped_release free;
        self.step({tokens, batch, reinterpret_cast<const void*>(x), reinterpret_cast<const int64_t*>(positions),
                   reinterpret_cast<const int64_t*>(slots), reinterpret_cast<const int32_t*>(block_table), table_stride,
                   reinterpret_cast<const int32_t*>(kv_lens), reinterpret_cast<const int32_t*>(cu_q),
                   reinterpret_cast<void*>(out)},
                  torch_parallel());
      });
}

}  // namespace llmcore
