// What the kernels of the backward pass share beside tile.cuh: products over whole tiles, weights from saved statistics, launch policy.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace pytransformer {

// products += a bᵀ: SLICES · 16 rows of tile `a` from a_row on, the first N rows of tile `b`.
template <int WIDTH, int SLICES, int N, class T>
__device__ __forceinline__ void multiply_rows(float (&products)[SLICES][N / 8][4], const T* a, int a_row, const T* b) {
  const ReadA<T, WIDTH> read_a(a);
  const ReadTransposedB<T, WIDTH> read_b(b);
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    uint32_t left[SLICES][4];
#pragma unroll
    for (int m = 0; m < SLICES; ++m) read_a.read(left[m], a_row + m * 16, k);
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t right[4];
      read_b.read(right, n * 8, k);
#pragma unroll
      for (int m = 0; m < SLICES; ++m) {
        ptx::mma_m16n8k16<T>(products[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(products[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sums += values b: `values` rounded to T, the first N rows of tile `b`.
template <int WIDTH, int SLICES, int N, class T>
__device__ __forceinline__ void accumulate_product(float (&sums)[SLICES][WIDTH / 8][4], const float (&values)[SLICES][N / 8][4], const T* b) {
  const ReadB<T, WIDTH> read_b(b);
#pragma unroll
  for (int k = 0; k < N / 8; k += 2) {
    uint32_t left[SLICES][4];
#pragma unroll
    for (int m = 0; m < SLICES; ++m) accumulators_as_a<T>(left[m], values[m][k], values[m][k + 1]);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      uint32_t right[4];
      read_b.read(right, k * 8, n * 8);
#pragma unroll
      for (int m = 0; m < SLICES; ++m) {
        ptx::mma_m16n8k16<T>(sums[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(sums[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Writes a warp's sums, times `factor`, to memory, by way of the rows of `tile` from tile_row on, which no other warp uses any more.
template <int WIDTH, int SLICES, class T>
__device__ __forceinline__ void write_sums(T* rows, int64_t stride, int rows_left, int cols, float (&sums)[SLICES][WIDTH / 8][4], float factor,
                                           T* tile, int tile_row) {
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
      for (float& sum : sums[m][n]) sum *= factor;
      store_accumulator<WIDTH>(tile, tile_row + m * 16, n * 8, sums[m][n]);
    }
  }
  __syncwarp();
  write_rows<SLICES * 16, WIDTH>(rows, stride, rows_left, cols, tile, tile_row);
}

struct PositionRange {
  int32_t low, high;

  __device__ __forceinline__ bool has(int32_t position) const { return (position >= low) & (position <= high); }
};

// Which pairs of queries and keys are seen. No sum here leaves 32 bits: see kMaxRows.
struct Sight {
  int32_t seqlen_q, seqlen_k, window_left, window_right;

  // query + seqlen_k - seqlen_q - key
  __device__ __forceinline__ int32_t distance(int32_t query, int32_t key) const { return query + (seqlen_k - seqlen_q) - key; }

  // Queries that see `key`.
  __device__ __forceinline__ PositionRange queries_of(int32_t key) const {
    const int32_t diagonal = key - (seqlen_k - seqlen_q);
    return {diagonal - window_right, min(diagonal + window_left, seqlen_q - 1)};
  }

  // Keys that `query` sees.
  __device__ __forceinline__ PositionRange keys_of(int32_t query) const {
    const int32_t diagonal = query + (seqlen_k - seqlen_q);
    return {diagonal - window_left, min(diagonal + window_right, seqlen_k - 1)};
  }

  // Whether some pair of a rectangle of queries and keys is seen: its first ones exist and the range of its distances meets the window.
  __device__ __forceinline__ bool any(int32_t query, int32_t queries, int32_t key, int32_t keys) const {
    return query < seqlen_q && key < seqlen_k && distance(query + queries - 1, key) >= -window_right &&
           distance(query, key + keys - 1) <= window_left;
  }

  // Whether every pair of it is.
  __device__ __forceinline__ bool all(int32_t query, int32_t queries, int32_t key, int32_t keys) const {
    return query + queries <= seqlen_q && key + keys <= seqlen_k && distance(query, key + keys - 1) >= -window_right &&
           distance(query + queries - 1, key) <= window_left;
  }
};

// Calls function(masked, softcap) with the two as constants, so that its loops are compiled without branches; softcap exists with TERMS only.
template <bool TERMS, class Function>
__device__ __forceinline__ void with_constants(bool masked, bool softcap, const Function& function) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if constexpr (TERMS) {
    if (softcap) {
      masked ? function(yes, yes) : function(no, yes);
      return;
    }
  }
  masked ? function(yes, no) : function(no, no);
}

// Weight of a query and a key; what the gradient of its score is multiplied with to pass through softcap goes to `slope`.
template <bool TERMS, bool SOFTCAP>
__device__ __forceinline__ float weight_of(float product, float shift, int32_t distance, const Scores<TERMS>& scores, float& slope) {
  slope = 1.0f;
  if constexpr (!TERMS) return scores.weight(product, shift);
  float score = product * scores.factor;
  if constexpr (SOFTCAP) {
    const float ratio = fast_tanh(score * scores.inverse_softcap);
    slope = 1.0f - ratio * ratio;
    score = scores.softcap * ratio;
  }
  return scores.weight(score - scores.slope * fabsf(static_cast<float>(distance)), shift);
}

// The workspace: two statistics of each query, laid out like lse.
__host__ __device__ inline int64_t num_statistics(const AttentionCall& call) {
  return (call.cu_seqlens_q != nullptr ? 1 : static_cast<int64_t>(call.batch)) * call.num_heads * call.seqlen_q;
}

// What a block may have on the smallest GPUs served (sm_86, sm_89, sm_120): one stage of every kernel fits.
inline constexpr int kLeastSharedMemory = 99 * 1024;

// Stages of a pipeline over tiles. Two hide the latency of loads behind products, but so does a second block on the same SM: two where two
// blocks have room with them, or where there is no room for two blocks anyway.
inline int choose_stages(int bytes_of_one, int bytes_of_two, const DeviceLimits& limits) {
  constexpr int kReserved = 1024;  // of each block, by the runtime
  const auto blocks = [&](int bytes) { return (limits.shared_memory + kReserved) / (bytes + kReserved); };
  if (blocks(bytes_of_two) >= 2) return 2;
  return blocks(bytes_of_one) >= 2 || blocks(bytes_of_two) == 0 ? 1 : 2;
}

}  // namespace pytransformer
