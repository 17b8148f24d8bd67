#include "ops.h"

#include "ops_backward.h"
#include "ops_call.h"

namespace pytransformer {
namespace {

std::tuple<Tensor, Tensor> attention_forward_op(Tensor q, Tensor k, Tensor v, OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                OptionalTensor cu_seqlens_k, double softmax_scale, bool causal, int64_t window_left,
                                                int64_t window_right, double softcap) {
  AttentionForward forward{};
  forward.call = check_attention(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_left, window_right, softcap);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < q.dim(); ++i) shape.push_back(q.size(i));
  shape.push_back(forward.call.value_dim);
  Tensor out = empty(q, shape, q.scalar_type());
  Tensor lse = empty(q, statistic_shape(forward.call), ScalarType::Float);
  if (lse.numel() > 0) {
    const LaunchScope scope(q);
    forward.out = out.mutable_data_ptr();
    forward.lse = static_cast<float*>(lse.mutable_data_ptr());
    attention_forward(forward, scope.stream());
  }
  return {out, lse};
}

}  // namespace

void define_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "float softmax_scale, bool causal, int window_left, int window_right, float softcap) -> (Tensor, Tensor)");
  library.def(kAttentionBackwardSchema);
}

void implement_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("attention_forward", TORCH_BOX(&attention_forward_op));
  library.impl("attention_backward", TORCH_BOX(&attention_backward_op));
}

}  // namespace pytransformer
