// What the forward and the backward op check alike.
#pragma once

#include "../common/tensor.h"
#include "attention.h"

namespace pytransformer {

// The arguments that say what is attended to, checked and in the form that the kernels take.
//
// q, k, v: (batch, seqlen, heads, dim), with cu_seqlens (seqlen, heads, dim); float16 or bfloat16, features contiguous, rows 16-byte aligned.
// alibi_slopes: float32, (num_heads) or (batch, num_heads). Windows: -1 is unlimited.
AttentionCall check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& alibi_slopes,
                              const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double softmax_scale, bool causal,
                              int64_t window_left, int64_t window_right, double softcap);

// Checks that 16 bytes can be read at once wherever 8 features of `tensor`, (…, heads, dim), begin, and returns its strides.
RowStrides check_rows(const char* name, const Tensor& tensor);

// Shape of a statistic of each query, like lse.
std::vector<int64_t> statistic_shape(const AttentionCall& call);

}  // namespace pytransformer
