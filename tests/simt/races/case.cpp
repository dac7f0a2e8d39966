#include "case.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <new>

#include "simt.h"

namespace races {
namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : llmcore::has_scales(dtype) ? 1 : 2; }

double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 2e-5;
    case DType::bf16: return 1.6e-2;
    case DType::f16: return 2e-3;
    case DType::i8: return 1.5 / 127;  // one step, where a quotient falls between two
    case DType::f8: return 1.01 * 32 / 448;
  }
  return 0;
}

double f8_value(unsigned code) {
  const unsigned magnitude = code & 0x7f, exponent = magnitude >> 3, fraction = magnitude & 7;
  if (magnitude == 0x7f) return NAN;
  const double value = exponent ? std::ldexp(8 + fraction, static_cast<int>(exponent) - 10) : std::ldexp(fraction, -9);
  return code & 0x80 ? -value : value;
}

uint64_t random_state = 0x9e3779b97f4a7c15ull;
double uniform() {  // in (0, 1)
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (static_cast<double>(random_state >> 33) + 0.5) / 2147483648.0;
}

std::vector<double> values(const Tensor& tensor) {
  std::vector<double> result(tensor.size());
  for (int64_t i = 0; i < tensor.size(); ++i) result[i] = tensor.get(i);
  return result;
}

void prepare(const Output& output) {
  if (output.replaces)
    output.tensor.copy_from(*output.replaces);
  else
    output.tensor.fill_bytes(output.zeroed ? 0 : 0xff);
}

void compare(const char* label, const Output& output, const std::vector<double>& expected) {
  double largest = 0;
  for (double x : expected)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  const double allowed = (output.tolerance > 0 ? output.tolerance : tolerance_of(output.tensor.dtype())) * largest;
  for (int64_t i = 0; i < output.tensor.size(); ++i) {
    const double got = output.tensor.get(i), want = expected[i];
    const bool same = got == want || (got != got && want != want) || std::fabs(got - want) <= allowed;
    if (same) continue;
    char text[300];
    snprintf(text, sizeof text, "%s: %s[%lld] is %.9g, the CPU kernel's %.9g; the largest is %.9g", label, output.name,
             static_cast<long long>(i), got, want, largest);
    throw std::runtime_error(text);
  }
}

std::vector<Case>& table() {
  static std::vector<Case> all;
  return all;
}

void run_serially(int64_t workers, void* context, void (*body)(void*, int64_t)) {
  for (int64_t w = 0; w < workers; ++w) body(context, w);
}

}  // namespace

const llmcore::Parallel kSerial{1, run_serially};

void Tensor::Delete::operator()(unsigned char* bytes) const { ::operator delete(bytes, std::align_val_t(16)); }

Tensor::Tensor(DType dtype, int64_t n, int64_t bytes_of_element)
    : dtype_(dtype),
      size_(n),
      num_bytes_(n * bytes_of_element),
      bytes_(static_cast<unsigned char*>(::operator new(std::max<int64_t>(num_bytes_, 1), std::align_val_t(16)))) {
  fill_bytes(0xff);
}
Tensor::Tensor(DType dtype, int64_t n) : Tensor(dtype, n, bytes_of(dtype)) {}
Tensor Tensor::doubles(int64_t n) { return Tensor(DType::f32, n, 8); }

void Tensor::fill_bytes(int byte) { memset(data(), byte, num_bytes_); }

void Tensor::copy_from(const Tensor& other) { memcpy(data(), other.data(), num_bytes_); }

double Tensor::get(int64_t i) const {
  if (num_bytes_ == 8 * size_) return as<double>()[i];
  switch (dtype_) {
    case DType::f32: return as<float>()[i];
    case DType::f16: return simt::f16_value(as<uint16_t>()[i]);
    case DType::i8: return as<int8_t>()[i];
    case DType::f8: return f8_value(as<uint8_t>()[i]);
    case DType::bf16: break;
  }
  const uint32_t bits = static_cast<uint32_t>(as<uint16_t>()[i]) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

void Tensor::set(int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  switch (dtype_) {
    case DType::f32: as<float>()[i] = rounded; return;
    case DType::f16: as<uint16_t>()[i] = static_cast<uint16_t>(simt::f16_bits(rounded)); return;
    case DType::i8: as<int8_t>()[i] = static_cast<int8_t>(std::nearbyint(value)); return;
    case DType::f8: {  // of inputs only, which are finite and in range: towards zero is good enough, here and below
      unsigned code = 0x7e;
      while (f8_value(code) > std::fabs(value)) --code;
      as<uint8_t>()[i] = static_cast<uint8_t>(code | (value < 0 ? 0x80 : 0));
      return;
    }
    case DType::bf16: break;
  }
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
}

Tensor random_normal(DType dtype, int64_t n) {
  Tensor tensor(dtype, n);
  for (int64_t i = 0; i < n; ++i)
    tensor.set(i, std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
  return tensor;
}

Tensor random_uniform(DType dtype, int64_t n, double low, double high) {
  Tensor tensor(dtype, n);
  for (int64_t i = 0; i < n; ++i) tensor.set(i, low + (high - low) * uniform());
  return tensor;
}

void run_and_compare(const char* label, std::initializer_list<Output> outputs, void* context,
                     llmcore::cuda::Status (*on_emulator)(void*), void (*on_cpu)(void*)) {
  for (const Output& output : outputs) prepare(output);
  on_cpu(context);
  std::vector<std::vector<double>> expected;
  for (const Output& output : outputs) expected.push_back(values(output.tensor));
  for (const Output& output : outputs) prepare(output);
  if (const char* error = on_emulator(context)) throw std::runtime_error(std::string(label) + ": " + error);
  size_t i = 0;
  for (const Output& output : outputs) compare(label, output, expected[i++]);
}

bool add_case(const char* kernel, void (*run)()) {
  table().push_back({kernel, run});
  return true;
}

const std::vector<Case>& cases() { return table(); }

}  // namespace races
