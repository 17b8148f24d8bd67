// PTX instructions that CUDA C++ has no name for, each with a host twin in the emulator. Nothing outside this file writes inline PTX.
#pragma once

#include "numerics.cuh"

namespace pytransformer::ptx {

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying BYTES (4, 8 or 16) from global to shared memory; zeros are written where `valid` is false, and nothing is read.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const int source_bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // only 16 bytes can bypass L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(source_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed groups are still under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. TRANSPOSED: each matrix is transposed.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c += a b for a 16x16 (row-major fragments), b 16x8 (column-major), c 16x8 in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x of the special function unit: at most 2 ulp off, subnormal results become 0, 2^-inf = 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Whether there is an instruction that reads float8_e4m3fn.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
inline constexpr bool kReadsE4m3 = true;

// Two codes, one in each byte, as two float16: exact, NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3_as_float16(uint16_t codes) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
  return pair;
}
#else
inline constexpr bool kReadsE4m3 = false;

__device__ uint32_t e4m3_as_float16(uint16_t codes);  // a name for code that asks kReadsE4m3 first
#endif

#else

using emulator::Location;

template <int BYTES>
inline void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulator::cp_async(shared, global, BYTES, valid);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int PENDING>
inline void cp_async_wait() {
  emulator::cp_async_wait(PENDING);
}
template <bool TRANSPOSED>
inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row, Location location = Location::current()) {
  emulator::ldmatrix_x4(matrices, row, TRANSPOSED, location);
}
template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Location location = Location::current()) {
  emulator::mma_m16n8k16<T>(c, a, b0, b1, location);
}
inline float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return std::fabs(result) < 0x1p-126f ? 0.0f : result;
}

inline constexpr bool kReadsE4m3 = true;

inline uint32_t e4m3_as_float16(uint16_t codes) {
  const auto one = [](uint32_t code) {
    const float mantissa = static_cast<float>(code & 7u), sign = code & 0x80u ? -1.0f : 1.0f;
    const int exponent = static_cast<int>(code >> 3 & 15u);
    if ((code & 0x7fu) == 0x7fu) return uint32_t{0x7fffu};
    return uint32_t{__half_as_ushort(__float2half_rn(
        sign * (exponent == 0 ? mantissa * 0x1p-9f : std::ldexp(8.0f + mantissa, exponent - 10))))};
  };
  return one(codes & 0xffu) | one(codes >> 8) << 16;
}

#endif

// Two floats rounded to T and packed as the mma fragments want them: `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  struct Pair {
    T low, high;
  } pair{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace pytransformer::ptx
