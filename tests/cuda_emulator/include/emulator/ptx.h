// Host twins of the PTX that csrc/common/ptx.cuh wraps: asynchronous copies, ldmatrix, and tensor-core products.
#pragma once

#include <type_traits>

namespace emulator {

// The data lands at the latest moment allowed, and is NaN until then.
void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

void ldmatrix_x4(uint32_t (&matrices)[4], const void* row, bool transposed, const Location& location);

// mma.sync.m16n8k16 with float32 accumulation.
void mma_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location);
void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location);

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  (std::is_same_v<T, __half> ? mma_float16 : mma_bfloat16)(c, a, b0, b1, location);
}

}  // namespace emulator
