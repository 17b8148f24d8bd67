// What the norm kernels share: loads of any of the three types, where a row begins, and sums over the threads of a row.
#pragma once

#include "../common/vector.cuh"
#include "norm.h"

namespace pytransformer::norm {

constexpr int size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

template <class T>
struct TypeTag {
  using Element = T;
};

// Calls `function` with the tag of `type`. Every thread takes the same branch, so what a loop inside `function` loads is in flight together.
template <class Function>
__device__ __forceinline__ void with_type(ElementType type, Function function) {
  if (type == ElementType::float32) {
    function(TypeTag<float>{});
  } else if (type == ElementType::float16) {
    function(TypeTag<float16>{});
  } else {
    function(TypeTag<bfloat16>{});
  }
}

// Elements that one instruction moves when N in a row are wanted.
template <int N, class T>
inline constexpr int kPiece = N < kVectorLength<T> ? N : kVectorLength<T>;

// Loads N elements in pieces of at most 16 bytes, whose alignment is all that is asked.
template <int N, class T>
__device__ __forceinline__ void load_pieces(float (&floats)[N], const T* address) {
  constexpr int PIECE = kPiece<N, T>;
#pragma unroll
  for (int i = 0; i < N; i += PIECE) {
    const Vector<T, PIECE> piece = load_vector<PIECE>(address + i);
#pragma unroll
    for (int j = 0; j < PIECE; ++j) floats[i + j] = to_float(piece.values[j]);
  }
}

// Rounds N floats to T and stores them in pieces of at most 16 bytes.
template <int N, class T>
__device__ __forceinline__ void store_pieces(T* address, const float (&floats)[N]) {
  constexpr int PIECE = kPiece<N, T>;
#pragma unroll
  for (int i = 0; i < N; i += PIECE) {
    Vector<T, PIECE> piece;
#pragma unroll
    for (int j = 0; j < PIECE; ++j) piece.values[j] = from_float<T>(floats[i + j]);
    store_vector<PIECE>(address + i, piece);
  }
}

// Element at which a row begins.
__device__ __forceinline__ int64_t row_offset(int64_t row, int64_t rows_per_group, RowStrides strides) {
  if (strides.group == 0) return row * strides.row;  // the division takes longer than a load
  return row / rows_per_group * strides.group + row % rows_per_group * strides.row;
}

template <class T>
__device__ __forceinline__ const T* row_of(const void* tensor, int64_t row, int64_t rows_per_group, RowStrides strides) {
  return static_cast<const T*>(tensor) + row_offset(row, rows_per_group, strides);
}

// Sums each of N values over the blockDim.x threads of a row: a power of two up to 32, or more and a multiple of 32, and then the block
// has but this row. Every thread gets the same bits.
//
// `scratch`: 32 N floats of shared memory, not to be used again before another block barrier.
template <int N>
__device__ __forceinline__ void row_sums(float (&values)[N], float* scratch) {
  const int threads = blockDim.x;
  for (int offset = (threads < kWarpSize ? threads : kWarpSize) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], offset);
  }
  if (threads <= kWarpSize) return;
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * kWarpSize + threadIdx.x / kWarpSize] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = warp_reduce<kWarpSize>(lane < threads / kWarpSize ? scratch[i * kWarpSize + lane] : 0.0f, Sum{});
  }
}

__device__ __forceinline__ float row_sum(float value, float* scratch) {
  float values[1] = {value};
  row_sums(values, scratch);
  return values[0];
}

inline constexpr size_t kScratchBytes = 4 * kWarpSize * sizeof(float);  // two uses of row_sums<2>, or four of row_sum

}  // namespace pytransformer::norm
