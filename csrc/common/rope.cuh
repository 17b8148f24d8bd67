// The arithmetic of RoPE, shared by the op and by the cache append that has it fused in: the same bits in both.
#pragma once

#include "vector.cuh"

namespace pytransformer {

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). Every product and sum is rounded to float32 by itself, as torch does it.
__device__ __forceinline__ float rotated_first(float x1, float x2, float cos, float sin) {
  return __fadd_rn(__fmul_rn(x1, cos), -__fmul_rn(x2, sin));
}
__device__ __forceinline__ float rotated_second(float x1, float x2, float cos, float sin) {
  return __fadd_rn(__fmul_rn(x2, cos), __fmul_rn(x1, sin));
}

// Loads N floats of cos or sin, 16 bytes at a time; N less than 4 is one vector.
template <int N>
__device__ __forceinline__ void load_table(float* values, const float* table) {
  constexpr int STEP = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += STEP) {
    const Vector<float, STEP> part = load_vector<STEP>(table + i);
#pragma unroll
    for (int j = 0; j < STEP; ++j) values[i + j] = part.values[j];
  }
}

}  // namespace pytransformer
