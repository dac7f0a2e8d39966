// For test_check_ptxas.py: more live values than registers, an array that is indexed at run time, and neither.
__global__ void __launch_bounds__(1024) spills(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int round = 0; round < 16; ++round)
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + round) % 64] + v[(i + round) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];
}

__global__ void indexes(float* x, const int* order) {
  float v[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = x[i] * x[i + 1];
  for (int i = 0; i < 100; ++i) v[order[i]] += v[order[i + 1]];
  x[threadIdx.x] = v[order[threadIdx.x]];
}

__global__ void doubles(float* x) { x[threadIdx.x] *= 2; }
