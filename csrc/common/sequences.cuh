// Packed sequences: whose a token is.
#pragma once

#include "device.cuh"

namespace pytransformer {

// The last of `count` sequences (at least one) that begins at or before `token`; the first one if none does.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens, int count, int64_t token) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Element `index` of an int32 or int64 array.
__device__ __forceinline__ int64_t load_integer(const void* values, bool is_64, int64_t index) {
  return is_64 ? static_cast<const int64_t*>(values)[index] : static_cast<const int32_t*>(values)[index];
}

}  // namespace pytransformer
