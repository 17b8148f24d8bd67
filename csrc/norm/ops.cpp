#include "ops.h"

#include "norm.h"

namespace pytransformer {
namespace {

Tensor norm_inference(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, double eps, double weight_offset,
                      bool is_rms) {
  check_dtype("x", x); (void)bias; (void)residual; (void)weight_offset; (void)is_rms;
  Tensor y = torch::stable::empty_like(x);
  const LaunchScope scope(x);
  NormForward call{};
  call.x = x.const_data_ptr();
  call.weight = weight ? weight->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.cols = x.size(x.dim() - 1);
  call.rows = x.numel() / call.cols;
  call.eps = static_cast<float>(eps);
  norm_forward(call, scope.stream());
  return y;
}

}  // namespace

void define_norm_ops(torch::stable::detail::StableLibrary& library) {
  library.def("norm_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float weight_offset, bool is_rms) -> Tensor");
}

void implement_norm_ops(torch::stable::detail::StableLibrary& library) { library.impl("norm_inference", TORCH_BOX(&norm_inference)); }

}  // namespace pytransformer
