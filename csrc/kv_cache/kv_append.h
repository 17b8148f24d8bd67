// KV-cache append: what the kernel is given.
#pragma once

#include <cstdint>

#include "../common/element_type.h"

struct CUstream_st;

namespace pytransformer {

// New tokens, (batch, seqlen, heads, dim), or (1, tokens, heads, dim) where packed. Strides count elements; the last dimension is contiguous.
struct NewTokens {
  const void* data;
  int64_t stride_batch, stride_token, stride_head;
  int heads, dim;
};

struct Cache {
  void* data;  // (pages, page_size, heads, dim)
  int64_t stride_page, stride_token, stride_head;
  float* scale;  // (heads), or (pages, page_size, heads) where it is written; null if the cache is not quantised
  int64_t stride_scale_page, stride_scale_token, stride_scale_head;
};

struct NormWeight {
  const void* data;  // (dim), or null: no norm
  ElementType type;
};

struct KvAppend {
  NewTokens q, k, v;  // q.heads = 0: no q
  Cache k_cache, v_cache;
  void* new_q;  // (tokens, q.heads, q.dim), contiguous
  NormWeight q_norm, k_norm;
  float norm_eps, norm_weight_offset;

  // Where tokens go: by slot, or by the length of their sequence before appending.
  const int64_t* slot_mapping;
  const int32_t* cache_seqlens;    // (batch)
  const int32_t* block_table;      // (batch, max_pages), or null
  const int32_t* cu_seqlens;       // (batch + 1), or null
  const int32_t* cache_batch_idx;  // (batch), or null
  const void* positions;           // per token, or null: where it is written to; int64 where positions_64, else int32
  int64_t stride_slot_batch, stride_slot_token, stride_table, stride_positions_batch, stride_positions_token;
  int64_t pages, page_size, max_pages;
  unsigned tokens, seqlen;  // tokens of all sequences, and in each row of k
  int batch;                // sequences

  const float* cos;  // (length, rotary_dim / 2), or null
  const float* sin;
  int64_t stride_cos, stride_sin, length;
  int rotary_dim;
  ElementType type, cache_type;
  bool interleaved, positions_64, scale_per_token;
};

void kv_append(const KvAppend& call, CUstream_st* stream);

}  // namespace pytransformer
