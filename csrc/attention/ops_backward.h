#pragma once

#include "../common/tensor.h"

namespace pytransformer {

inline constexpr const char* kAttentionBackwardSchema =
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, bool causal, int window_left, int window_right, float softcap) "
    "-> (Tensor, Tensor, Tensor)";

// (dq, dk, dv), contiguous. dout: (…, num_heads, value_dim), rows 16-byte aligned; out, lse, dlse: contiguous.
std::tuple<Tensor, Tensor, Tensor> attention_backward_op(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                         OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                         OptionalTensor cu_seqlens_k, double softmax_scale, bool causal, int64_t window_left,
                                                         int64_t window_right, double softcap);

}  // namespace pytransformer
