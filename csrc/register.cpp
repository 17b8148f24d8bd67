// The ops of torch.ops.pytransformer_cuda: their schemas, and the functions that serve them (each op's ops.cpp).
#include <string>

#include "common/build_info.h"
#include "common/tensor.h"
#include "norm/ops.h"

namespace pytransformer {

// "version;source id;architectures;CUDA version;emulated or cuda": what pytransformer/extension.py compares with itself.
std::string build_info() {
  return std::string(kVersion) + ";" + kSourceId + ";" + kArchitectures + ";" + kCudaVersion + ";" + (kIsEmulated ? "emulated" : "cuda");
}

}  // namespace pytransformer

STABLE_TORCH_LIBRARY(pytransformer_cuda, library) {
  library.def("build_info() -> str");
  pytransformer::define_norm_ops(library);
}

STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&pytransformer::build_info));
}

#ifdef PYT_EMULATED
STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CUDA, library) {
#endif
  pytransformer::implement_norm_ops(library);
}
