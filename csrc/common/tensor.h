// Torch tensors as the ops see them, through torch's stable ABI (one binary serves torch 2.10 and later). Not for kernels: those take
// pointers and sizes, and know nothing of torch.
//
// Every op checks all of its arguments here before it allocates or launches. The messages serve who calls torch.ops directly; the Python
// functions check first, in clearer words.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#ifndef PYT_EMULATED
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

// Not in a CPU-only libtorch: weak, so that the extension loads there too, where its schemas and checks are tested.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
#else
using cudaStream_t = struct CUstream_st*;
#endif

namespace pytransformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// PYT_CHECK(condition, parts of the message...)
#define PYT_CHECK(condition, ...)                              \
  do {                                                         \
    if (!(condition)) ::pytransformer::throw_error(__VA_ARGS__); \
  } while (false)

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

// "(2, 3)"
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline bool is_floating_16_or_32(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_dtype(const char* name, const Tensor& tensor) {
  PYT_CHECK(is_floating_16_or_32(tensor.scalar_type()), name, " must be float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& first) {
  PYT_CHECK(tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), name,
            " must be on the device of the first argument");
}

inline void check_same_shape(const char* name, const Tensor& tensor, const Tensor& first) {
  bool same = tensor.dim() == first.dim();
  for (int64_t i = 0; same && i < first.dim(); ++i) same = tensor.size(i) == first.size(i);
  PYT_CHECK(same, name, " must have shape ", shape_of(first), ", got ", shape_of(tensor));
}

inline void check_last_dimension_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  PYT_CHECK(tensor.dim() > 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name, " must be contiguous in its last dimension");
}

// An uninitialised contiguous tensor on the device of `like`. Not by new_empty, whose way through the dispatcher takes a microsecond.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// Makes the device of a tensor current while it lives, and knows torch's current stream there.
class LaunchScope {
 public:
#ifdef PYT_EMULATED
  explicit LaunchScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    PYT_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

}  // namespace pytransformer
