// Memory that the host and the kernels reach alike, and the comparison of what kernels left in it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "launch.cuh"
#include "program.h"

namespace programs {

// n elements, filled with 0xff bytes (NaN as a float) until something else is written. Aligned to 16 bytes.
template <class T>
class Array {
 public:
  explicit Array(size_t n) : size_(n) {
#ifdef __CUDACC__
    if (cudaMallocManaged(&data_, n * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
#else
    data_ = static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(16)));
#endif
    memset(static_cast<void*>(data_), 0xff, n * sizeof(T));
  }
  ~Array() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    ::operator delete(data_, std::align_val_t(16));
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// The end of a launch: what it wrote can be read, and what went wrong is known.
inline llmcore::cuda::Status finished(llmcore::cuda::Status status) {
#ifdef __CUDACC__
  if (!status) status = llmcore::cuda::text(cudaDeviceSynchronize());
#endif
  return status;
}

// Relative error up to which two numbers count as equal; 0: bit for bit, except that any two NaNs are.
inline bool agree(float got, float expected, double tolerance) {
  if (got != got || expected != expected) return got != got && expected != expected;
  if (got == expected) return true;
  return tolerance > 0 && std::abs(static_cast<double>(got) - expected) <= tolerance * std::abs(expected);
}
inline bool agree(uint32_t got, uint32_t expected, double) { return got == expected; }

template <class T>
Outcome compare(llmcore::cuda::Status status, Array<T>& got, const std::vector<T>& expected, double tolerance = 0) {
  if (status) return {Seen::error, status};
  for (size_t i = 0; i < expected.size(); ++i)
    if (!agree(got[i], expected[i], tolerance)) {
      char line[120];
      snprintf(line, sizeof line, "[%zu] is %.9g, expected %.9g", i, static_cast<double>(got[i]),
               static_cast<double>(expected[i]));
      return {Seen::wrong_numbers, line};
    }
  return {Seen::right, ""};
}

inline uint32_t word(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A repeatable stream of small integers: exact in 16 bits, and their products and sums in float32, in any order.
class SmallIntegers {
 public:
  int next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<int>(state_ >> 24) % 9 - 4;
  }

 private:
  uint32_t state_ = 1;
};

inline const llmcore::cuda::Device kDevice{nullptr, 1, 227 * 1024};

}  // namespace programs
