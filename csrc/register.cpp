// The ops of torch.ops.pytransformer_cuda: their schemas, and the functions that serve them (each op's ops.cpp).
#include <string>

#include "attention/ops.h"
#include "common/build_info.h"
#include "common/tensor.h"
#include "decode_attention/ops.h"
#include "kv_cache/ops.h"
#include "norm/ops.h"
#include "rope/ops.h"

namespace pytransformer {

// "version;source id;architectures;CUDA version;emulated or cuda": what pytransformer/extension.py compares with itself.
std::string build_info() {
  return std::string(kVersion) + ";" + kSourceId + ";" + kArchitectures + ";" + kCudaVersion + ";" + (kIsEmulated ? "emulated" : "cuda");
}

}  // namespace pytransformer

STABLE_TORCH_LIBRARY(pytransformer_cuda, library) {
  library.def("build_info() -> str");
  pytransformer::define_attention_ops(library);
  pytransformer::define_decode_attention_ops(library);
  pytransformer::define_kv_append_ops(library);
  pytransformer::define_norm_ops(library);
  pytransformer::define_rope_ops(library);
}

STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&pytransformer::build_info));
}

#ifdef PYT_EMULATED
STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(pytransformer_cuda, CUDA, library) {
#endif
  pytransformer::implement_attention_ops(library);
  pytransformer::implement_decode_attention_ops(library);
  pytransformer::implement_kv_append_ops(library);
  pytransformer::implement_norm_ops(library);
  pytransformer::implement_rope_ops(library);
}
