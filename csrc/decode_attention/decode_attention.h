// Decode attention over a KV cache: what the kernels are given, and how a call is cut into programs.
#pragma once

#include <cstdint>

#include "../common/element_type.h"

struct CUstream_st;

namespace pytransformer {

// Strides count elements. Every pointer that may be missing is null then.
struct DecodeAttention {
  const void* q;  // (batch, seqlen_q, heads, head_dim), or packed (total_q, heads, head_dim)
  int64_t stride_q_batch, stride_q_token, stride_q_head;
  const void* k;  // (rows, capacity, kv_heads, head_dim) or (pages, page_size, kv_heads, head_dim)
  int64_t stride_k_page, stride_k_token, stride_k_head;
  const void* v;  // likewise, with value_dim
  int64_t stride_v_page, stride_v_token, stride_v_head;
  void* out;  // as q, with value_dim; contiguous
  int64_t stride_out_batch, stride_out_token, stride_out_head;
  float* lse;  // (batch, heads, seqlen_q) or (heads, total_q)
  int64_t stride_lse_batch, stride_lse_head;

  const int32_t* cache_seqlens;    // (batch)
  const int32_t* cu_seqlens_q;     // (batch + 1) or null
  const int32_t* cache_leftpad;    // (batch) or null
  const int32_t* cache_batch_idx;  // (batch) or null
  const int32_t* block_table;      // (batch, pages) or null
  int64_t stride_block_table;

  const uint8_t* mask;  // (batch, heads, score_rows, keys) or null; strides of 0 where it broadcasts
  int64_t stride_mask_batch, stride_mask_head, stride_mask_token, stride_mask_key;
  const void* bias;  // likewise
  int64_t stride_bias_batch, stride_bias_head, stride_bias_token, stride_bias_key;
  const void* alibi_slopes;  // (batch, heads) or null
  int64_t stride_alibi_batch;
  const void* sinks;     // (heads) or null
  const float* k_scale;  // (rows, capacity, kv_heads) or null; strides of 0 where there is one per head
  int64_t stride_k_scale_page, stride_k_scale_token, stride_k_scale_head;
  const float* v_scale;
  int64_t stride_v_scale_page, stride_v_scale_token, stride_v_scale_head;

  ElementType type;        // of q and out
  ElementType cache_type;  // the same, or of 8 bits
  ElementType bias_type, alibi_type, sinks_type;
  bool scale_per_token;
  int batch, num_kv_heads, group, head_dim, value_dim;
  int page_size;  // 0 without a block table
  int capacity;   // slots for keys that one sequence has, left padding included; nothing behind them is looked at
  int num_keys;   // keys that a mask or bias reaches, counted behind the left padding
  int seqlen_q;   // of each sequence; packed: the longest
  int total_q;    // packed: tokens in q
  int mask_rows, bias_rows;
  int window_left, window_right;  // negative = unlimited; a causal call has window_right 0
  float softmax_scale, softcap;   // softcap 0 = none
  int q_vector_bytes, k_vector_bytes, v_vector_bytes;  // 16 or 8 where every row may be read so, else 0
};

// The launch for the sequences with more than `rows_above` and up to `rows_up_to` query rows (tokens · heads per key head).
struct DecodeClass {
  int rows_above, rows_up_to;
  int block_rows;  // query rows of a block: 16, whose warps share the keys, or 16 for each warp
  int max_splits;  // of a sequence's keys; 1 = none is split
  int num_tiles;   // of the longest sequence in this class
  int rows;        // of its longest tile: scratch per split
  int num_programs;
  // Null where nothing is split. Outputs of `num_programs` · (max_splits + 1) splits, (rows, value_dim) each, then maxima and sums of
  // `num_programs` · (max_splits + 2), (2, rows) each.
  float* scratch;
  int32_t* counters;  // one for each program, all zero, and zero again when the launch ends
};

// How many floats `scratch` has.
inline int64_t scratch_size(const DecodeClass& programs, int value_dim) {
  const int64_t rows = int64_t(programs.num_programs) * programs.rows;
  return rows * (programs.max_splits + 1) * value_dim + rows * (programs.max_splits + 2) * 2;
}

inline constexpr int kMaxDecodeClasses = 3;

// Fills `classes` with those that the call needs and returns how many; num_splits 0 = the policy's. Scratch and counters are left to the caller.
int decode_classes(const DecodeAttention& call, int num_splits, DecodeClass (&classes)[kMaxDecodeClasses]);

void decode_attention(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream);

}  // namespace pytransformer
