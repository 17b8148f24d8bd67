// Codes of a quantised cache: code = round(clamp(x / scale)), half to even, the same bits as the reference on every architecture.
#pragma once

#include "../common/numerics.cuh"

namespace pytransformer {

inline constexpr float kHighestInt8 = 127.0f;
inline constexpr float kHighestE4m3 = 448.0f;

// The larger one; NaN if one is NaN, as torch's amax has it.
struct MaxOrNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Scale of a token whose largest feature is `amax`: 1 where that is 0, or so small that the quotient is. An IEEE division.
__device__ __forceinline__ float scale_of(float amax, float highest) {
  const float scale = amax / highest;
  return scale > 0.0f ? scale : 1.0f;
}

__device__ __forceinline__ uint8_t encode_int8(float scaled) {
  return static_cast<uint8_t>(static_cast<int8_t>(rintf(fminf(fmaxf(scaled, -128.0f), 127.0f))));
}

// float8_e4m3fn by hand: parts older than sm_89 have no instruction for it, and the instruction of the others loses the sign of a NaN.
__device__ __forceinline__ uint8_t encode_e4m3(float scaled) {
  const uint32_t sign = __float_as_uint(scaled) >> 24 & 0x80u;
  if (scaled != scaled) return static_cast<uint8_t>(sign | 0x7fu);
  const float magnitude = fminf(fabsf(scaled), kHighestE4m3);
  if (magnitude < 0x1p-6f) {  // subnormal codes: multiples of 2^-9
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(magnitude * 512.0f)));
  }
  // Of the 23 bits of mantissa 3 stay, and the exponent's bias changes from 127 to 7; a carry moves into the exponent.
  const uint32_t bits = __float_as_uint(magnitude);
  return static_cast<uint8_t>(sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3)));
}

}  // namespace pytransformer
