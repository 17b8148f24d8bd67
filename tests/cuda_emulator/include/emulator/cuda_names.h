// CUDA's own names, for the kernels: barriers, shuffles, votes, atomics, and intrinsics that the host headers lack.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulator {

uint64_t shuffle_bits(unsigned mask, uint64_t value, int source, const char* what, const Location& location);
unsigned ballot(unsigned mask, bool vote, const char* what, const Location& location);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* what, const Location& location) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(mask, bits, source, what, location);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Lane `source` where it lies in the calling lane's segment of `width` lanes, else the calling lane itself.
inline int within_segment(int source, int width) {
  const int first = lane() / width * width;
  return source < first || source >= first + width ? lane() : source;
}

}  // namespace emulator

#define EMULATOR_HERE emulator::Location location = emulator::Location::current()

inline void __syncthreads(EMULATOR_HERE) { emulator::block_barrier("__syncthreads", location); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_HERE) { emulator::warp_barrier(mask, location); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, emulator::lane() / width * width + source % width, "__shfl_sync", location);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, emulator::within_segment(emulator::lane() ^ bits, width), "__shfl_xor_sync", location);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, emulator::within_segment(emulator::lane() + int(delta), width), "__shfl_down_sync", location);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, emulator::within_segment(emulator::lane() - int(delta), width), "__shfl_up_sync", location);
}
inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::ballot(mask, vote != 0, "__ballot_sync", location);
}
inline int __any_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::ballot(mask, vote != 0, "__any_sync", location) != 0;
}
inline int __all_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::ballot(mask, vote != 0, "__all_sync", location) == mask;
}

template <class T>
T atomicAdd(T* address, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do {
      after = before + value;
    } while (!__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
  }
}
// All threads of a launch run on one of the host; of a fence between the host's threads g++ warns under ThreadSanitizer.
inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
// Byte i of the result is that of the eight bytes of low and high which the i-th nibble of the selector names.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
// A product of two 16-bit numbers is exact in float64.
inline __half2 __hfma2(const __half2& a, const __half2& b, const __half2& c) {
  const auto one = [](__half x, __half y, __half z) { return __double2half(double{__half2float(x)} * __half2float(y) + __half2float(z)); };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hfma2(const __nv_bfloat162& a, const __nv_bfloat162& b, const __nv_bfloat162& c) {
  const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __double2bfloat16(double{__bfloat162float(x)} * __bfloat162float(y) + __bfloat162float(z));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(b) < Common(a) ? Common(b) : Common(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(a) < Common(b) ? Common(b) : Common(a);
}
