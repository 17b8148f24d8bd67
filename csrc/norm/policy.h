// What the launch policies of both passes share. Host code.
#pragma once

#include <algorithm>

#include "access.cuh"

namespace pytransformer::norm {

inline int64_t next_power_of_2(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// Whether rows of a tensor begin where accesses of `length` elements are allowed. An absent one is null, which is aligned.
inline bool allows_vectors(const void* tensor, ElementType type, RowStrides strides, int length) {
  return is_aligned(tensor, static_cast<size_t>(std::min(16, length * size_of(type)))) && strides.row % length == 0 &&
         strides.group % length == 0;
}

// Threads of a row whose threads hold `elements` each: a part of a warp, or whole warps.
inline int threads_of_row(int64_t cols, int64_t elements) {
  const int64_t threads = ceil_div(cols, elements);
  return static_cast<int>(threads <= kWarpSize ? next_power_of_2(threads) : ceil_div<int64_t>(threads, kWarpSize) * kWarpSize);
}

// Narrow rows share a block of four warps.
inline int rows_of_block(int threads) { return threads <= kWarpSize ? 4 * kWarpSize / threads : 1; }

}  // namespace pytransformer::norm
