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

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "element_type.h"

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

// What an argument that does not fit raises: ValueError in Python, where a failed launch (LaunchError) is a RuntimeError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw ArgumentError(message.str());
}

// PYT_CHECK(condition, parts of the message...)
#define PYT_CHECK(condition, ...)                           \
  do {                                                      \
    if (!(condition)) ::pytransformer::refuse(__VA_ARGS__); \
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

// A shape: of a tensor, a vector, or a list that is written down in a call.
struct Shape : std::span<const int64_t> {
  using span::span;
  Shape(std::initializer_list<int64_t> sizes) : span(std::data(sizes), sizes.size()) {}

  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  // Without the last dimension.
  Shape leading() const { return {data(), size() - 1}; }
  // "(2, 3)"
  std::string text() const {
    std::string list;
    for (const int64_t size : *this) list += (list.empty() ? "" : ", ") + std::to_string(size);
    return "(" + list + ")";
  }
};

// What an op asks of a tensor, asked once: each question to torch is a call through its C ABI, and small eager ops ask dozens.
struct Facts {
  explicit Facts(const Tensor& tensor) : tensor(tensor), dim(tensor.dim()), type(tensor.scalar_type()) {
    int64_t* found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &found));
    shape = {found, static_cast<size_t>(dim)};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &found));
    strides = found;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }

  // Counted from the end where negative.
  int64_t size(int64_t i) const { return shape[i < 0 ? i + dim : i]; }
  int64_t stride(int64_t i) const { return strides[i < 0 ? i + dim : i]; }
  template <class T = void>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  bool is_quantised() const { return type == ScalarType::Char || type == ScalarType::Float8_e4m3fn; }

  const Tensor& tensor;
  int64_t dim;
  ScalarType type;
  Shape shape;
  const int64_t* strides;
  int32_t device_type, device_index;
};

using OptionalFacts = std::optional<Facts>;

inline OptionalFacts facts_of(const OptionalTensor& tensor) { return tensor ? OptionalFacts(std::in_place, *tensor) : std::nullopt; }

template <class T = void>
const T* data_of(const OptionalFacts& tensor) {
  return tensor ? tensor->data<T>() : nullptr;
}

inline ElementType element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return ElementType::float16;
    case ScalarType::BFloat16:
      return ElementType::bfloat16;
    case ScalarType::Char:
      return ElementType::int8;
    case ScalarType::Float8_e4m3fn:
      return ElementType::float8_e4m3fn;
    default:
      return ElementType::float32;
  }
}

// --- Checks -------------------------------------------------------------------------------------------------------------------------------

inline bool is_floating_16_or_32(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_floating(const char* name, const Facts& tensor) {
  PYT_CHECK(is_floating_16_or_32(tensor.type), name, " must be float32, float16 or bfloat16, got ", name_of(tensor.type));
}

inline void check_floating_16(const char* name, const Facts& tensor) {
  PYT_CHECK(tensor.type == ScalarType::Half || tensor.type == ScalarType::BFloat16, name, " must be float16 or bfloat16, got ",
            name_of(tensor.type));
}

inline void check_type(const char* name, const Facts& tensor, ScalarType type) {
  PYT_CHECK(tensor.type == type, name, " must be ", name_of(type), ", got ", name_of(tensor.type));
}

inline void check_int32_or_int64(const char* name, const Facts& tensor) {
  PYT_CHECK(tensor.type == ScalarType::Int || tensor.type == ScalarType::Long, name, " must be int32 or int64, got ",
            name_of(tensor.type));
}

inline void check_device(const char* name, const Facts& tensor, const Facts& first) {
  PYT_CHECK(tensor.device_type == first.device_type && tensor.device_index == first.device_index, name,
            " must be on the device of the first argument");
}

inline void check_shape(const char* name, const Facts& tensor, Shape shape) {
  PYT_CHECK(tensor.shape == shape, name, " must have shape ", shape.text(), ", got ", tensor.shape.text());
}

inline void check_rows_contiguous(const char* name, const Facts& tensor) {
  PYT_CHECK(tensor.dim > 0 && (tensor.size(-1) <= 1 || tensor.stride(-1) == 1), name, " must be contiguous in its last dimension");
}

inline void check_contiguous(const char* name, const Facts& tensor) {
  PYT_CHECK(tensor.tensor.is_contiguous(), name, " must be contiguous");
}

// cos and sin of RoPE for heads of `head_dim` features.
inline void check_rope_tables(const Facts& cos, const Facts& sin, const Facts& first, int64_t head_dim) {
  check_type("cos", cos, ScalarType::Float);
  check_type("sin", sin, ScalarType::Float);
  check_device("cos", cos, first);
  check_device("sin", sin, first);
  PYT_CHECK(cos.dim == 2 && cos.size(1) > 0 && 2 * cos.size(1) <= head_dim,
            "cos must have shape (length, rotary_dim / 2), with rotary_dim from 2 to ", head_dim, ", got ", cos.shape.text());
  check_shape("sin", sin, cos.shape);
  check_rows_contiguous("cos", cos);
  check_rows_contiguous("sin", sin);
}

// --- Results ------------------------------------------------------------------------------------------------------------------------------

// An uninitialised contiguous tensor on the device of `like`. Not by new_empty, whose way through the dispatcher takes a microsecond.
inline Tensor empty(const Facts& like, Shape shape, ScalarType type) {
  int64_t strides[64], stride = 1;  // torch's tensors have at most 64 dimensions
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides, dtype, like.device_type,
                                                  like.device_index, &handle));
  return Tensor(handle);
}

// Makes the device of a tensor current while it lives, and knows torch's current stream there.
class LaunchScope {
 public:
#ifdef PYT_EMULATED
  explicit LaunchScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  bool is_capturing() const { return false; }
#else
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  // Whether the stream records into a CUDA graph.
  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

}  // namespace pytransformer
