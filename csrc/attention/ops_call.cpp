#include "ops_call.h"

#include <algorithm>
#include <cmath>

namespace pytransformer {
namespace {

// Fewer rows than a tile of any of the kernels has, for the check that a grid is not too large.
constexpr int64_t kSmallestTile = 16;

void check_features(const char* name, int64_t features) {
  PYT_CHECK(features >= 8 && features <= 256 && features % 8 == 0, "head_dim of ", name, " must be a multiple of 8 from 8 to 256, got ", features);
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, bool packed) {
  const ScalarType type = q.scalar_type();
  PYT_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "q must be float16 or bfloat16, got ", name_of(type));
  const int64_t dims = packed ? 3 : 4;
  PYT_CHECK(q.dim() == dims, "q must have ", dims, " dimensions ", packed ? "with" : "without", " cu_seqlens, got shape ", shape_of(q));
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    PYT_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), " like q, got ", name_of(tensor.scalar_type()));
    check_same_device(name, tensor, q);
    PYT_CHECK(tensor.dim() == dims && (packed || tensor.size(0) == q.size(0)), name, " of shape ", shape_of(tensor),
              " does not go with q of shape ", shape_of(q));
  }
  PYT_CHECK(k.size(dims - 1) == q.size(dims - 1), "k must have the head_dim of q, ", q.size(dims - 1), ", got ", k.size(dims - 1));
  PYT_CHECK(v.size(dims - 2) == k.size(dims - 2) && v.size(dims - 3) == k.size(dims - 3), "v must have the length and the heads of k, shape ",
            shape_of(k), ", got ", shape_of(v));
  check_features("q", q.size(dims - 1));
  check_features("v", v.size(dims - 1));
  const int64_t heads = q.size(dims - 2), kv_heads = k.size(dims - 2);
  PYT_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "num_kv_heads must divide num_heads, got ", kv_heads, " and ", heads);
}

const int32_t* check_cu_seqlens(const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  PYT_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, name, " must be int32, got ", name_of(cu_seqlens.scalar_type()));
  PYT_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, name, " must have shape (batch + 1), got ", shape_of(cu_seqlens));
  check_last_dimension_contiguous(name, cu_seqlens);
  check_same_device(name, cu_seqlens, q);
  return static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
}

void add_alibi(AttentionCall& call, const Tensor& slopes, const Tensor& q) {
  PYT_CHECK(slopes.scalar_type() == ScalarType::Float, "alibi_slopes must be float32, got ", name_of(slopes.scalar_type()));
  check_same_device("alibi_slopes", slopes, q);
  const int64_t dims = slopes.dim();
  const bool fits = (dims == 1 || (dims == 2 && slopes.size(0) == call.batch)) && slopes.size(dims - 1) == call.num_heads;
  PYT_CHECK(fits, "alibi_slopes must have shape (num_heads) or (batch, num_heads), got ", shape_of(slopes));
  call.alibi_slopes = static_cast<const float*>(slopes.const_data_ptr());
  call.stride_alibi_batch = dims == 2 ? slopes.stride(0) : 0;
  call.stride_alibi_head = slopes.stride(dims - 1);
}

// -1 is unlimited, and so is an edge that no two positions are far enough apart to reach.
int32_t window_edge(const char* name, int64_t edge, int64_t length) {
  PYT_CHECK(edge >= -1, name, " must be -1 or more, got ", edge);
  return edge < 0 || edge >= length - 1 ? kUnlimited : static_cast<int32_t>(edge);
}

}  // namespace

RowStrides check_rows(const char* name, const Tensor& tensor) {
  check_last_dimension_contiguous(name, tensor);
  const int64_t dims = tensor.dim();
  const auto stride = [&](int64_t dimension) {
    if (dimension < 0 || tensor.size(dimension) <= 1) return int64_t{0};  // never stepped over
    PYT_CHECK(tensor.stride(dimension) % 8 == 0, name, " must have strides that are multiples of 8 elements, got ", tensor.stride(dimension));
    return tensor.stride(dimension);
  };
  PYT_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name, " must be 16-byte aligned");
  return {dims == 4 ? stride(0) : 0, stride(dims - 3), stride(dims - 2)};
}

std::vector<int64_t> statistic_shape(const AttentionCall& call) {
  if (call.is_packed()) return {call.num_heads, call.seqlen_q};
  return {call.batch, call.num_heads, call.seqlen_q};
}

AttentionCall check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& alibi_slopes,
                              const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double softmax_scale, bool causal,
                              int64_t window_left, int64_t window_right, double softcap) {
  const bool packed = cu_seqlens_q.has_value();
  PYT_CHECK(cu_seqlens_k.has_value() == packed, "cu_seqlens_q and cu_seqlens_k go together");
  check_qkv(q, k, v, packed);
  AttentionCall call{};
  if (packed) {
    call.cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, q);
    call.cu_seqlens_k = check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, q);
    PYT_CHECK(cu_seqlens_k->size(0) == cu_seqlens_q->size(0), "cu_seqlens_k must have shape ", shape_of(*cu_seqlens_q), " like cu_seqlens_q, got ",
              shape_of(*cu_seqlens_k));
  }
  const int64_t dims = q.dim(), batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  const int64_t rows = std::max(q.size(dims - 3), k.size(dims - 3)), heads = q.size(dims - 2);
  PYT_CHECK(rows <= kMaxRows && batch <= kMaxRows && heads <= kMaxRows, "at most ", kMaxRows, " rows, sequences and heads are served");
  const double tiles = (static_cast<double>(rows) / kSmallestTile + batch + 1) * heads * (packed ? 1 : batch);
  PYT_CHECK(tiles < INT32_MAX, "rows times heads are too many for one launch: ", shape_of(q));
  call.batch = static_cast<int32_t>(batch);
  call.num_heads = static_cast<int32_t>(heads);
  call.num_kv_heads = static_cast<int32_t>(k.size(dims - 2));
  call.seqlen_q = static_cast<int32_t>(q.size(dims - 3));
  call.seqlen_k = static_cast<int32_t>(k.size(dims - 3));
  call.head_dim = static_cast<int32_t>(q.size(dims - 1));
  call.value_dim = static_cast<int32_t>(v.size(dims - 1));
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.stride_q = check_rows("q", q);
  call.stride_k = check_rows("k", k);
  call.stride_v = check_rows("v", v);
  if (alibi_slopes) add_alibi(call, *alibi_slopes, q);
  call.window_left = window_edge("window_left", window_left, call.seqlen_k);
  const int32_t right = window_edge("window_right", window_right, call.seqlen_q);
  call.window_right = causal ? 0 : right;
  PYT_CHECK(std::isfinite(softmax_scale), "softmax_scale must be finite, got ", softmax_scale);
  PYT_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 or more and finite, got ", softcap);
  call.softmax_scale = static_cast<float>(softmax_scale);
  call.softcap = static_cast<float>(softcap);
  call.is_bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  return call;
}

}  // namespace pytransformer
