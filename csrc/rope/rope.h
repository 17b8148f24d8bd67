// Rotary position embedding of q and k: what the kernel is given.
#pragma once

#include <cstdint>

#include "../common/element_type.h"

struct CUstream_st;

namespace pytransformer {

// Strides count elements. The last dimension is contiguous everywhere.
struct RopeOperand {
  const void* in;  // (batch, seqlen, heads, head_dim); null where there is no k
  void* out;       // likewise; the same memory as `in` for a rotation in place
  int64_t stride_in_batch, stride_in_token, stride_in_head;
  int64_t stride_out_batch, stride_out_token, stride_out_head;
  int heads;
};

struct RopeCall {
  RopeOperand q, k;
  const float* cos;  // (length, rotary_dim / 2)
  const float* sin;
  const void* positions;     // per token, or null; int64 where positions_64, else int32
  const void* offsets;       // per sequence, or null; int64 where offsets_64, else int32; not with positions
  const int32_t* cu_seqlens; // (num_sequences + 1), or null; not with positions
  int64_t stride_cos, stride_sin, stride_positions_batch, stride_positions_token, stride_offsets;
  int64_t offset, length;
  unsigned tokens, seqlen;  // tokens of all sequences, below 2^31, and of each
  int num_sequences, head_dim, rotary_dim;
  ElementType type;
  bool positions_64, offsets_64, interleaved, reverse, inplace;
};

void rope_rotate(const RopeCall& call, CUstream_st* stream);

}  // namespace pytransformer
