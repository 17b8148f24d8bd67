// Conversions between storage types and float32, and reductions over a warp or a block.
#pragma once

#include "device.cuh"

namespace pytransformer {

using float32 = float;
using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int kWarpSize = 32;

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Reduces over groups of WIDTH neighbouring lanes (a power of two); every lane of a group gets the same bits.
template <int WIDTH, class Operation>
__device__ __forceinline__ float warp_reduce(float value, Operation operation) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) {
    value = operation(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Sum over a block of WARPS warps, all of whose threads call it; every thread gets the same bits.
//
// `scratch` holds WARPS floats of shared memory. It may be used again after the next block barrier only, so callers that sum twice in a
// row pass two arrays.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_reduce<kWarpSize>(value, Sum{});
  if constexpr (WARPS > 1) {
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) value += scratch[warp];
  }
  return value;
}

}  // namespace pytransformer
