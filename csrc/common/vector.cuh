// Loads and stores of several elements at once: up to 16 bytes per thread, the widest access a GPU has per instruction.
#pragma once

#include "numerics.cuh"

namespace pytransformer {

// N elements of T, aligned so that one instruction moves them.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <class T>
inline constexpr int kVectorLength = 16 / sizeof(T);

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <int N, class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

// Loads N elements and widens them to float32.
template <int N, class T>
__device__ __forceinline__ void load_floats(float (&floats)[N], const T* address) {
  const Vector<T, N> vector = load_vector<N>(address);
#pragma unroll
  for (int i = 0; i < N; ++i) floats[i] = to_float(vector.values[i]);
}

// Rounds N floats to T and stores them.
template <int N, class T>
__device__ __forceinline__ void store_floats(T* address, const float (&floats)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.values[i] = from_float<T>(floats[i]);
  store_vector<N>(address, vector);
}

// Whether `address` allows vectors of `bytes`.
inline bool is_aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace pytransformer
