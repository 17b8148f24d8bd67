#include "ops.h"

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace pytransformer {
namespace {

// Fewer rows than a tile of any of the kernels has, for the check that a grid is not too large.
constexpr int64_t kSmallestTile = 16;

void check_features(const char* name, int64_t features) {
  PYT_CHECK(features >= 8 && features <= 256 && features % 8 == 0, "head_dim of ", name, " must be a multiple of 8 from 8 to 256, got ", features);
}

void check_qkv(const Facts& q, const Facts& k, const Facts& v, bool packed) {
  check_floating_16("q", q);
  const int64_t dims = packed ? 3 : 4;
  PYT_CHECK(q.dim == dims, "q must have ", dims, " dimensions ", packed ? "with" : "without", " cu_seqlens, got shape ", q.shape.text());
  for (const auto& [name, tensor] : {std::pair<const char*, const Facts&>{"k", k}, {"v", v}}) {
    PYT_CHECK(tensor.type == q.type, name, " must be ", name_of(q.type), " like q, got ", name_of(tensor.type));
    check_device(name, tensor, q);
    PYT_CHECK(tensor.dim == dims && (packed || tensor.size(0) == q.size(0)), name, " of shape ", tensor.shape.text(),
              " does not go with q of shape ", q.shape.text());
  }
  PYT_CHECK(k.size(-1) == q.size(-1), "k must have the head_dim of q, ", q.size(-1), ", got ", k.size(-1));
  PYT_CHECK(v.size(-2) == k.size(-2) && v.size(-3) == k.size(-3), "v must have the length and the heads of k, shape ", k.shape.text(),
            ", got ", v.shape.text());
  check_features("q", q.size(-1));
  check_features("v", v.size(-1));
  const int64_t heads = q.size(-2), kv_heads = k.size(-2);
  PYT_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "num_kv_heads must divide num_heads, got ", kv_heads, " and ", heads);
}

void check_cu_seqlens(const char* name, const Facts& cu_seqlens, const Facts& q) {
  check_type(name, cu_seqlens, ScalarType::Int);
  PYT_CHECK(cu_seqlens.dim == 1 && cu_seqlens.size(0) >= 1, name, " must have shape (batch + 1), got ", cu_seqlens.shape.text());
  check_rows_contiguous(name, cu_seqlens);
  check_device(name, cu_seqlens, q);
}

void add_alibi(AttentionCall& call, const Facts& slopes, const Facts& q) {
  check_type("alibi_slopes", slopes, ScalarType::Float);
  check_device("alibi_slopes", slopes, q);
  const bool fits = (slopes.dim == 1 || (slopes.dim == 2 && slopes.size(0) == call.batch)) && slopes.size(-1) == call.num_heads;
  PYT_CHECK(fits, "alibi_slopes must have shape (num_heads) or (batch, num_heads), got ", slopes.shape.text());
  call.alibi_slopes = slopes.data<float>();
  call.stride_alibi_batch = slopes.dim == 2 ? slopes.stride(0) : 0;
  call.stride_alibi_head = slopes.stride(-1);
}

// -1 is unlimited, and so is an edge that no two positions are far enough apart to reach.
int32_t window_edge(const char* name, int64_t edge, int64_t length) {
  PYT_CHECK(edge >= -1, name, " must be -1 or more, got ", edge);
  return edge < 0 || edge >= length - 1 ? kUnlimited : static_cast<int32_t>(edge);
}

// Checks that 16 bytes can be read at once wherever 8 features of `tensor`, (…, heads, dim), begin, and returns its strides.
RowStrides check_rows(const char* name, const Facts& tensor) {
  check_rows_contiguous(name, tensor);
  const auto stride = [&](int64_t dimension) {
    if (tensor.dim + dimension < 0 || tensor.size(dimension) <= 1) return int64_t{0};  // never stepped over
    PYT_CHECK(tensor.stride(dimension) % 8 == 0, name, " must have strides that are multiples of 8 elements, got ", tensor.stride(dimension));
    return tensor.stride(dimension);
  };
  PYT_CHECK(reinterpret_cast<uintptr_t>(tensor.data()) % 16 == 0, name, " must be 16-byte aligned");
  return {stride(-4), stride(-3), stride(-2)};
}

// The arguments that say what is attended to, checked and in the form that the kernels take.
//
// q, k, v: (batch, seqlen, heads, dim), with cu_seqlens (seqlen, heads, dim); float16 or bfloat16, features contiguous, rows 16-byte aligned.
// alibi_slopes: float32, (num_heads) or (batch, num_heads). Windows: -1 is unlimited.
AttentionCall check_attention(const Facts& q, const Facts& k, const Facts& v, const OptionalTensor& alibi_slopes,
                              const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double softmax_scale, bool causal,
                              int64_t window_left, int64_t window_right, double softcap) {
  const bool packed = cu_seqlens_q.has_value();
  PYT_CHECK(cu_seqlens_k.has_value() == packed, "cu_seqlens_q and cu_seqlens_k go together");
  check_qkv(q, k, v, packed);
  AttentionCall call{};
  if (packed) {
    const Facts starts_q(*cu_seqlens_q), starts_k(*cu_seqlens_k);
    check_cu_seqlens("cu_seqlens_q", starts_q, q);
    check_cu_seqlens("cu_seqlens_k", starts_k, q);
    PYT_CHECK(starts_k.shape == starts_q.shape, "cu_seqlens_k must have shape ", starts_q.shape.text(), " like cu_seqlens_q, got ",
              starts_k.shape.text());
    call.cu_seqlens_q = starts_q.data<int32_t>();
    call.cu_seqlens_k = starts_k.data<int32_t>();
  }
  const int64_t batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0), rows = std::max(q.size(-3), k.size(-3)), heads = q.size(-2);
  PYT_CHECK(rows <= kMaxRows && batch <= kMaxRows && heads <= kMaxRows, "at most ", kMaxRows, " rows, sequences and heads are served");
  const double tiles = (static_cast<double>(rows) / kSmallestTile + batch + 1) * heads * (packed ? 1 : batch);
  PYT_CHECK(tiles < INT32_MAX, "rows times heads are too many for one launch: ", q.shape.text());
  call.batch = static_cast<int32_t>(batch);
  call.num_heads = static_cast<int32_t>(heads);
  call.num_kv_heads = static_cast<int32_t>(k.size(-2));
  call.seqlen_q = static_cast<int32_t>(q.size(-3));
  call.seqlen_k = static_cast<int32_t>(k.size(-3));
  call.head_dim = static_cast<int32_t>(q.size(-1));
  call.value_dim = static_cast<int32_t>(v.size(-1));
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.stride_q = check_rows("q", q);
  call.stride_k = check_rows("k", k);
  call.stride_v = check_rows("v", v);
  if (alibi_slopes) add_alibi(call, Facts(*alibi_slopes), q);
  call.window_left = window_edge("window_left", window_left, call.seqlen_k);
  const int32_t right = window_edge("window_right", window_right, call.seqlen_q);
  call.window_right = causal ? 0 : right;
  PYT_CHECK(std::isfinite(softmax_scale), "softmax_scale must be finite, got ", softmax_scale);
  PYT_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 or more and finite, got ", softcap);
  call.softmax_scale = static_cast<float>(softmax_scale);
  call.softcap = static_cast<float>(softcap);
  call.type = element_type(q.type);
  return call;
}

// Shape of out and dout.
std::vector<int64_t> out_shape(const Facts& q, const AttentionCall& call) {
  std::vector<int64_t> shape(q.shape.begin(), q.shape.end());
  shape.back() = call.value_dim;
  return shape;
}

// Shape of a statistic of each query, like lse.
std::vector<int64_t> statistic_shape(const AttentionCall& call) {
  if (call.is_packed()) return {call.num_heads, call.seqlen_q};
  return {call.batch, call.num_heads, call.seqlen_q};
}

std::tuple<Tensor, Tensor> attention_forward_op(Tensor q, Tensor k, Tensor v, OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                OptionalTensor cu_seqlens_k, double softmax_scale, bool causal, int64_t window_left,
                                                int64_t window_right, double softcap) {
  const Facts like(q);
  AttentionForward forward{};
  forward.call = check_attention(like, Facts(k), Facts(v), alibi_slopes, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_left,
                                 window_right, softcap);
  Tensor out = empty(like, out_shape(like, forward.call), like.type), lse = empty(like, statistic_shape(forward.call), ScalarType::Float);
  if (lse.numel() > 0) {
    const LaunchScope scope(q);
    forward.out = out.mutable_data_ptr();
    forward.lse = static_cast<float*>(lse.mutable_data_ptr());
    attention_forward(forward, scope.stream());
  }
  return {out, lse};
}

void check_like(const char* name, const Facts& tensor, Shape shape, ScalarType type, const Facts& q) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, type);
  check_device(name, tensor, q);
}

// dout: (…, num_heads, value_dim), rows 16-byte aligned; out, lse and dlse: contiguous. Returns contiguous gradients.
std::tuple<Tensor, Tensor, Tensor> attention_backward_op(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                         OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                         OptionalTensor cu_seqlens_k, double softmax_scale, bool causal, int64_t window_left,
                                                         int64_t window_right, double softcap) {
  const Facts given_q(q), given_k(k), given_v(v), given_dout(dout), given_out(out), given_lse(lse);
  const OptionalFacts given_dlse = facts_of(dlse);
  AttentionBackward backward{};
  backward.call = check_attention(given_q, given_k, given_v, alibi_slopes, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_left,
                                  window_right, softcap);
  const std::vector<int64_t> shape = out_shape(given_q, backward.call), statistics = statistic_shape(backward.call);
  check_like("dout", given_dout, shape, given_q.type, given_q);
  backward.stride_dout = check_rows("dout", given_dout);
  check_like("out", given_out, shape, given_q.type, given_q);
  check_rows("out", given_out);
  check_like("lse", given_lse, statistics, ScalarType::Float, given_q);
  if (dlse) check_like("dlse", *given_dlse, statistics, ScalarType::Float, given_q);
  check_contiguous("out", given_out);
  check_contiguous("lse", given_lse);
  if (dlse) check_contiguous("dlse", *given_dlse);
  backward.dout = given_dout.data();
  backward.out = given_out.data();
  backward.lse = given_lse.data<float>();
  backward.dlse = data_of<float>(given_dlse);
  Tensor dq = empty(given_q, given_q.shape, given_q.type);
  Tensor dk = empty(given_k, given_k.shape, given_k.type), dv = empty(given_v, given_v.shape, given_v.type);
  Tensor workspace = empty(given_q, {attention_backward_workspace(backward.call)}, ScalarType::Float);
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

}  // namespace

#define PYT_ATTENTION_OPTIONS                                                                                                       \
  "Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, bool causal, " \
  "int window_left, int window_right, float softcap) -> "

void define_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.def("attention_forward(" PYT_ATTENTION_OPTIONS "(Tensor, Tensor)");
  library.def("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " PYT_ATTENTION_OPTIONS "(Tensor, Tensor, Tensor)");
}

void implement_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("attention_forward", TORCH_BOX(&attention_forward_op));
  library.impl("attention_backward", TORCH_BOX(&attention_backward_op));
}

}  // namespace pytransformer
