#include "ops_backward.h"

#include "ops_call.h"

namespace pytransformer {
namespace {

void check_like(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type, const Tensor& q) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == shape[i];
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  PYT_CHECK(fits, name, " must have shape (", expected, "), got ", shape_of(tensor));
  PYT_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", got ", name_of(tensor.scalar_type()));
  check_same_device(name, tensor, q);
}

const void* contiguous_data(const char* name, const Tensor& tensor) {
  PYT_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return tensor.const_data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_backward_op(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                         OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                         OptionalTensor cu_seqlens_k, double softmax_scale, bool causal, int64_t window_left,
                                                         int64_t window_right, double softcap) {
  AttentionBackward backward{};
  backward.call = check_attention(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_left, window_right, softcap);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < q.dim(); ++i) shape.push_back(q.size(i));
  shape.push_back(backward.call.value_dim);
  check_like("dout", dout, shape, q.scalar_type(), q);
  backward.stride_dout = check_rows("dout", dout);
  check_like("out", out, shape, q.scalar_type(), q);
  check_rows("out", out);
  check_like("lse", lse, statistic_shape(backward.call), ScalarType::Float, q);
  if (dlse) check_like("dlse", *dlse, statistic_shape(backward.call), ScalarType::Float, q);
  backward.dout = dout.const_data_ptr();
  backward.out = contiguous_data("out", out);
  backward.lse = static_cast<const float*>(contiguous_data("lse", lse));
  backward.dlse = dlse ? static_cast<const float*>(contiguous_data("dlse", *dlse)) : nullptr;
  const auto empty_like = [](const Tensor& tensor) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
    return empty(tensor, sizes, tensor.scalar_type());
  };
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  Tensor workspace = empty(q, {attention_backward_workspace(backward.call)}, ScalarType::Float);
  if (dq.numel() + dk.numel() + dv.numel() > 0) {
    const LaunchScope scope(q);
    backward.dq = dq.mutable_data_ptr();
    backward.dk = dk.mutable_data_ptr();
    backward.dv = dv.mutable_data_ptr();
    backward.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    attention_backward(backward, scope.stream());
  }
  return {dq, dk, dv};
}

}  // namespace pytransformer
