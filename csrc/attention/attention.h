// Attention over whole sequences, forward and backward: what the kernels are given. float16 and bfloat16 only.
//
// Query i sees key j iff -window_right <= d <= window_left, with d = i + seqlen_k - seqlen_q - j. Query head h reads key head
// h / (num_heads / num_kv_heads). A score is softcap(scale q·k) - slope |d|.
#pragma once

#include <cstdint>

#include "../common/element_type.h"

struct CUstream_st;

namespace pytransformer {

// Most rows of a tensor, so that sums of positions, distances and window edges stay within 32 bits.
inline constexpr int32_t kMaxRows = 1 << 29;
inline constexpr int32_t kUnlimited = 1 << 30;  // a window without an edge on that side

// Elements between neighbours; features are contiguous, and each row of them is 16-byte aligned. 0 where there is one only, or (batch)
// where sequences are packed.
struct RowStrides {
  int64_t batch, row, head;
};

struct AttentionCall {
  const void* q;                // (batch, seqlen_q, num_heads, head_dim), packed (seqlen_q, num_heads, head_dim)
  const void* k;                // (batch, seqlen_k, num_kv_heads, head_dim), packed likewise
  const void* v;                // (batch, seqlen_k, num_kv_heads, value_dim), packed likewise
  const int32_t* cu_seqlens_q;  // (batch + 1) starts of the packed sequences; null: not packed
  const int32_t* cu_seqlens_k;
  const float* alibi_slopes;  // (batch, num_heads); null: none
  RowStrides stride_q, stride_k, stride_v;
  int64_t stride_alibi_batch, stride_alibi_head;
  int32_t batch, num_heads, num_kv_heads;
  int32_t seqlen_q, seqlen_k;  // packed: of all sequences together
  int32_t head_dim, value_dim;  // multiples of 8, at most 256
  int32_t window_left, window_right;  // 0 or more; causality is window_right = 0
  float softmax_scale;
  float softcap;  // 0: none
  ElementType type;  // float16 or bfloat16

  constexpr bool is_packed() const { return cu_seqlens_q != nullptr; }
  // Whether a score is more than a positive multiple of q·k: then it is formed in natural units before the maximum is taken.
  constexpr bool has_score_terms() const { return softcap > 0.0f || alibi_slopes != nullptr || !(softmax_scale > 0.0f); }
};

struct AttentionForward {
  AttentionCall call;
  void* out;   // like q with value_dim features, contiguous
  float* lse;  // (batch, num_heads, seqlen_q), packed (num_heads, seqlen_q), contiguous
};

struct AttentionBackward {
  AttentionCall call;
  const void* dout;  // like out, strides of its own
  const void* out;   // what the forward gave, contiguous
  const float* lse;
  const float* dlse;  // like lse, contiguous; null: no gradient flows to it. Whatever it holds for a row that sees no key is ignored.
  void* dq;           // like q, k and v, contiguous
  void* dk;
  void* dv;
  float* workspace;  // attention_backward_workspace() floats, uninitialised
  RowStrides stride_dout;
};

// Writes every element of out and lse: 0 and -inf for a row that sees no key.
void attention_forward(const AttentionForward& call, CUstream_st* stream);

// Writes every element of dq, dk and dv, with the same bits each run.
void attention_backward(const AttentionBackward& call, CUstream_st* stream);

// Floats of workspace that attention_backward needs.
int64_t attention_backward_workspace(const AttentionCall& call);

}  // namespace pytransformer
