// What an op asks of a tensor, asked once: each question to torch is a call through its C ABI, and small eager ops ask dozens.
#pragma once

#include "element_type.h"
#include "tensor.h"

namespace pytransformer {

struct Facts {
  explicit Facts(const Tensor& tensor) : tensor(tensor), dim(tensor.dim()), type(tensor.scalar_type()) {
    int64_t* found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &found));
    sizes = found;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &found));
    strides = found;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }

  // Counted from the end where negative.
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + dim : i]; }
  int64_t stride(int64_t i) const { return strides[i < 0 ? i + dim : i]; }
  std::string shape() const { return shape_of(tensor); }
  template <class T = void>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  const Tensor& tensor;
  int64_t dim;
  ScalarType type;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t device_type, device_index;
};

inline std::optional<Facts> facts_of(const OptionalTensor& tensor) {
  return tensor ? std::optional<Facts>(std::in_place, *tensor) : std::nullopt;
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

inline void check_floating(const char* name, const Facts& tensor) {
  PYT_CHECK(is_floating_16_or_32(tensor.type), name, " must be float32, float16 or bfloat16, got ", name_of(tensor.type));
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

inline void check_rows_contiguous(const char* name, const Facts& tensor) {
  PYT_CHECK(tensor.dim > 0 && (tensor.size(-1) <= 1 || tensor.stride(-1) == 1), name, " must be contiguous in its last dimension");
}

inline bool has_shape(const Facts& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim != static_cast<int64_t>(shape.size())) return false;
  const int64_t* size = tensor.sizes;
  for (const int64_t wanted : shape) {
    if (*size++ != wanted) return false;
  }
  return true;
}

// cos and sin of RoPE for heads of `head_dim` features.
inline void check_rope_tables(const Facts& cos, const Facts& sin, const Facts& first, int64_t head_dim) {
  check_type("cos", cos, ScalarType::Float);
  check_type("sin", sin, ScalarType::Float);
  check_device("cos", cos, first);
  check_device("sin", sin, first);
  PYT_CHECK(cos.dim == 2 && cos.size(1) > 0 && 2 * cos.size(1) <= head_dim,
            "cos must have shape (length, rotary_dim / 2), with rotary_dim from 2 to ", head_dim, ", got ", cos.shape());
  PYT_CHECK(has_shape(sin, {cos.size(0), cos.size(1)}), "sin must have shape ", cos.shape(), ", got ", sin.shape());
  check_rows_contiguous("cos", cos);
  check_rows_contiguous("sin", sin);
}

// What is written to must not have elements that share memory.
inline void check_written(const char* name, const Facts& tensor) {
  for (int64_t i = 0; i < tensor.dim; ++i) {
    PYT_CHECK(tensor.sizes[i] <= 1 || tensor.strides[i] != 0, name, " is written to, so it must not be expanded");
  }
}

// Uninitialised tensors on the device and in the dtype of `like`; several times cheaper than new_empty, which goes through the dispatcher.
inline Tensor empty_strided(const Facts& like, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.tensor.get(), &type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type, like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous_like(const Facts& like) {
  constexpr int64_t kMaxDimensions = 8;
  int64_t strides[kMaxDimensions], stride = 1;
  PYT_CHECK(like.dim <= kMaxDimensions, "too many dimensions: ", like.shape());
  for (int64_t i = like.dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= like.sizes[i] > 1 ? like.sizes[i] : 1;
  }
  return empty_strided(like, like.dim, like.sizes, strides);
}

// What an op returns in the place of a result that was not asked for.
inline Tensor nothing_like(const Facts& like) {
  const int64_t size = 0, stride = 1;
  return empty_strided(like, 1, &size, &stride);
}

}  // namespace pytransformer
