// Which keys a tile of rows sees, how partial results of a row become one, and how a row ends.
#pragma once

#include "../common/ptx.cuh"
#include "decode_attention.h"

namespace pytransformer::decode {

inline constexpr float kInfinity = __builtin_huge_valf();

// e^x. Differences of scores are taken before they are brought to base 2: a bias of float32's lowest number would overflow otherwise.
__device__ __forceinline__ float exponential(float x) { return ptx::exp2_approximate(x * 1.4426950408889634f); }

__device__ __forceinline__ float load_as_float(const void* values, ElementType type, int64_t index) {
  switch (type) {
    case ElementType::float16:
      return to_float(static_cast<const float16*>(values)[index]);
    case ElementType::bfloat16:
      return to_float(static_cast<const bfloat16*>(values)[index]);
    default:
      return static_cast<const float*>(values)[index];
  }
}

// One sequence of the call.
struct Sequence {
  int first_token;  // of its queries, in packed q
  int seqlen_q, seqlen_k;
  int leftpad;  // cache slot of its first key
};

__device__ __forceinline__ Sequence sequence_of(const DecodeAttention& call, int index) {
  Sequence sequence{0, call.seqlen_q, call.cache_seqlens[index], 0};
  if (call.cache_leftpad != nullptr) sequence.leftpad = max(call.cache_leftpad[index], 0);
  if (call.cu_seqlens_q != nullptr) {
    sequence.first_token = max(call.cu_seqlens_q[index], 0);
    sequence.seqlen_q = min(call.cu_seqlens_q[index + 1], call.total_q) - sequence.first_token;
  }
  return sequence;
}

struct KeyRange {
  int low, high;  // empty if high <= low
};

// The keys that some of the query tokens [first_token, last_token] of a sequence see.
__device__ __forceinline__ KeyRange visible_keys(const DecodeAttention& call, const Sequence& sequence, int first_token, int last_token) {
  const int offset = sequence.seqlen_k - sequence.seqlen_q;
  KeyRange range{0, min(min(sequence.seqlen_k, call.num_keys), call.capacity - sequence.leftpad)};
  if (call.window_left >= 0) range.low = max(range.low, offset + first_token - call.window_left);
  if (call.window_right >= 0) range.high = min(range.high, offset + last_token + call.window_right + 1);
  return range;
}

__device__ __forceinline__ KeyRange tile_keys(const DecodeAttention& call, const Sequence& sequence, int first_row, int rows) {
  const int last_token = min((first_row + rows - 1) / call.group, sequence.seqlen_q - 1);
  return visible_keys(call, sequence, first_row / call.group, last_token);
}

// A row's softmax so far: largest score, sum of e^(score - largest).
struct RowStats {
  float max, sum;
};

// What exponents are counted from: a row that has seen nothing keeps -inf as its maximum, and subtracting that would give NaN.
__device__ __forceinline__ float exponent_shift(float max) { return max == -kInfinity ? 0.0f : max; }

struct RowEnd {
  float factor;  // output = sum of weighted values · factor
  float lse;
};

// The sink joins the denominator, and the row is done; 0 and -inf where there was nothing to see.
__device__ __forceinline__ RowEnd finish_row(const DecodeAttention& call, RowStats row, int head) {
  float factor = 1.0f;
  if (call.sinks != nullptr) {
    const float sink = load_as_float(call.sinks, call.sinks_type, head);
    const float max = fmaxf(row.max, sink), shift = exponent_shift(max);
    factor = exponential(row.max - shift);
    row = {max, __fmaf_rn(row.sum, factor, exponential(sink - shift))};
  }
  if (row.sum == 0.0f) return {0.0f, -kInfinity};
  return {factor / row.sum, __fadd_rn(row.max, logf(row.sum))};
}

// Folds the next split of a row into those before it (nothing yet is -infinity, 0, 0). A product is rounded before it is added and the rest
// is one fused operation, in so many words: a compiler that chose for itself could choose otherwise at another place.
template <int FEATURES>
__device__ __forceinline__ void fold(RowStats& total, float (&out)[FEATURES], const RowStats& split, const float (&split_out)[FEATURES]) {
  const float max = fmaxf(total.max, split.max), shift = exponent_shift(max);
  const float kept = exponential(total.max - shift), weight = exponential(split.max - shift);
  total = {max, __fmaf_rn(total.sum, kept, __fmul_rn(split.sum, weight))};
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) out[i] = __fmaf_rn(out[i], kept, __fmul_rn(split_out[i], weight));
}

// Where a row of the tile lies: query head, token in its sequence.
struct RowPlace {
  int token, head;
};

__device__ __forceinline__ RowPlace place_of(const DecodeAttention& call, int kv_head, int row) {
  return {row / call.group, kv_head * call.group + row % call.group};
}

__device__ __forceinline__ int64_t out_offset(const DecodeAttention& call, int sequence, int token, int head) {
  return sequence * call.stride_out_batch + token * call.stride_out_token + head * call.stride_out_head;
}

__device__ __forceinline__ void store_lse(const DecodeAttention& call, int sequence, int token, int head, float lse) {
  call.lse[sequence * call.stride_lse_batch + head * call.stride_lse_head + token] = lse;
}

}  // namespace pytransformer::decode
