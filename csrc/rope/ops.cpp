#include "ops.h"

#include "../common/overlap.h"
#include "rope.h"

namespace pytransformer {
namespace {

struct Arguments {
  Arguments(const Tensor& q, const OptionalTensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
            const OptionalTensor& offsets, int64_t offset, const OptionalTensor& cu_seqlens)
      : q(q), cos(cos), sin(sin), k(facts_of(k)), positions(facts_of(positions)), offsets(facts_of(offsets)),
        cu_seqlens(facts_of(cu_seqlens)), offset(offset) {}

  bool packed() const { return q.dim == 3; }
  int64_t batch() const { return packed() ? 1 : q.size(0); }
  int64_t seqlen() const { return q.size(-3); }

  Facts q, cos, sin;
  OptionalFacts k, positions, offsets, cu_seqlens;
  int64_t offset;
};

void check_operands(const Arguments& given) {
  const Facts& q = given.q;
  check_floating("q", q);
  PYT_CHECK(q.dim == 3 || q.dim == 4, "q must have 3 or 4 dimensions, got shape ", q.shape.text());
  check_rows_contiguous("q", q);
  if (!given.k) return;
  const Facts& k = *given.k;
  PYT_CHECK(k.type == q.type, "k must have the dtype of q, ", name_of(q.type), ", got ", name_of(k.type));
  check_device("k", k, q);
  PYT_CHECK(k.dim == q.dim && k.shape.leading().leading() == q.shape.leading().leading() && k.size(-1) == q.size(-1),
            "k must have the shape of q but for the heads, got ", k.shape.text(), " and ", q.shape.text());
  check_rows_contiguous("k", k);
}

void take_positions(RopeCall& call, const Arguments& given) {
  const Facts& positions = *given.positions;
  PYT_CHECK(!given.offsets && given.offset == 0, "offsets must not be given together with positions");
  check_int32_or_int64("positions", positions);
  check_device("positions", positions, given.q);
  const bool per_sequence = !given.packed() && positions.shape == Shape{given.batch(), given.seqlen()};
  PYT_CHECK(per_sequence || positions.shape == Shape{given.seqlen()}, "positions must have an entry for each token, got shape ",
            positions.shape.text());
  call.positions = positions.data();
  call.positions_64 = positions.type == ScalarType::Long;
  call.stride_positions_batch = per_sequence ? positions.stride(0) : 0;
  call.stride_positions_token = positions.stride(-1);
}

void take_offsets(RopeCall& call, const Arguments& given) {
  int64_t sequences = given.batch();
  if (given.cu_seqlens) {
    const Facts& bounds = *given.cu_seqlens;
    PYT_CHECK(given.packed(), "cu_seqlens needs packed q (total, num_heads, head_dim), got shape ", given.q.shape.text());
    check_type("cu_seqlens", bounds, ScalarType::Int);
    PYT_CHECK(bounds.dim == 1 && bounds.size(0) >= 1, "cu_seqlens must have shape (batch + 1), got ", bounds.shape.text());
    check_rows_contiguous("cu_seqlens", bounds);
    check_device("cu_seqlens", bounds, given.q);
    sequences = bounds.size(0) - 1;
    PYT_CHECK(sequences > 0 || given.seqlen() == 0, "cu_seqlens names no sequence for ", given.seqlen(), " tokens");
    call.cu_seqlens = bounds.data<int32_t>();
    call.num_sequences = static_cast<int>(sequences);
  }
  PYT_CHECK(given.offset >= 0, "offsets must be at least 0, got ", given.offset);
  call.offset = given.offset;
  if (!given.offsets) {
    const int64_t longest = given.cu_seqlens ? 0 : given.seqlen();  // how long packed sequences are is not known here
    PYT_CHECK(given.offset <= call.length - longest, "cos and sin must have a row for each position, got ", call.length,
              " rows for offset ", given.offset, " and ", longest, " tokens");
    return;
  }
  const Facts& offsets = *given.offsets;
  check_int32_or_int64("offsets", offsets);
  check_device("offsets", offsets, given.q);
  check_shape("offsets", offsets, {sequences});
  call.offsets = offsets.data();
  call.offsets_64 = offsets.type == ScalarType::Long;
  call.stride_offsets = offsets.stride(0);
}

void check_sizes(const Arguments& given) {
  constexpr int64_t kMax = (int64_t{1} << 30) - 1;
  const Facts& q = given.q;
  PYT_CHECK(given.batch() * given.seqlen() <= kMax && q.size(-2) <= kMax && q.size(-1) <= kMax && (!given.k || given.k->size(-2) <= kMax),
            "too many tokens or heads in q ", q.shape.text(), " or k");
}

// Checks everything; the operands are missing yet.
RopeCall checked(const Arguments& given, bool interleaved, bool reverse, bool inplace) {
  check_operands(given);
  check_rope_tables(given.cos, given.sin, given.q, given.q.size(-1));
  check_sizes(given);
  RopeCall call{};
  call.tokens = static_cast<unsigned>(given.batch() * given.seqlen());
  call.seqlen = static_cast<unsigned>(given.seqlen());
  call.length = given.cos.size(0);
  PYT_CHECK(call.length > 0 || call.tokens == 0, "cos and sin have no rows");
  if (given.positions) {
    take_positions(call, given);
  } else {
    take_offsets(call, given);
  }
  call.head_dim = static_cast<int>(given.q.size(-1));
  call.rotary_dim = static_cast<int>(2 * given.cos.size(1));
  call.cos = given.cos.data<float>();
  call.sin = given.sin.data<float>();
  call.stride_cos = given.cos.stride(0);
  call.stride_sin = given.sin.stride(0);
  call.type = element_type(given.q.type);
  call.interleaved = interleaved;
  call.reverse = reverse;
  call.inplace = inplace;
  return call;
}

RopeOperand inplace_operand(const Facts& x) {
  const int64_t batch = x.dim == 3 ? 0 : x.stride(0);
  return {x.data(), x.tensor.mutable_data_ptr(), batch, x.stride(-3), x.stride(-2), batch, x.stride(-3), x.stride(-2),
          static_cast<int>(x.size(-2))};
}

RopeOperand operand(const Facts& x, const Tensor& out) {
  const int64_t heads = x.size(-2), head_dim = x.size(-1), seqlen = x.size(-3);
  return {x.data(), out.mutable_data_ptr(), x.dim == 3 ? 0 : x.stride(0), x.stride(-3), x.stride(-2), seqlen * heads * head_dim,
          heads * head_dim, head_dim, static_cast<int>(heads)};
}

void run(const RopeCall& call, const Tensor& q) {
  if (call.tokens == 0 || call.q.heads + call.k.heads == 0) return;
  const LaunchScope scope(q);
  rope_rotate(call, scope.stream());
}

std::tuple<Tensor, Tensor> rope(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor offsets,
                                int64_t offset, OptionalTensor cu_seqlens, bool interleaved, bool reverse) {
  const Arguments given(q, k, cos, sin, positions, offsets, offset, cu_seqlens);
  RopeCall call = checked(given, interleaved, reverse, false);
  Tensor q_out = empty(given.q, given.q.shape, given.q.type);
  Tensor k_out = empty(given.q, given.k ? given.k->shape : Shape{0}, given.q.type);
  call.q = operand(given.q, q_out);
  if (given.k) call.k = operand(*given.k, k_out);
  run(call, q);
  return {std::move(q_out), std::move(k_out)};
}

void rope_inplace(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor offsets, int64_t offset,
                  OptionalTensor cu_seqlens, bool interleaved, bool reverse) {
  const Arguments given(q, k, cos, sin, positions, offsets, offset, cu_seqlens);
  RopeCall call = checked(given, interleaved, reverse, true);
  check_written("q", given.q);
  if (given.k) check_written("k", *given.k);
  check_apart({{"q", given.q}, {"k", given.k}},
              {{"cos", given.cos},
               {"sin", given.sin},
               {"positions", given.positions},
               {"offsets", given.offsets},
               {"cu_seqlens", given.cu_seqlens}});
  call.q = inplace_operand(given.q);
  if (given.k) call.k = inplace_operand(*given.k);
  run(call, q);
}

// Of the usual call: each absent argument of the general op costs its caller as much as a dictionary look-up.
std::tuple<Tensor, Tensor> rope_at(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, int64_t offset, bool interleaved) {
  return rope(q, k, cos, sin, {}, {}, offset, {}, interleaved, false);
}
void rope_at_inplace(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, int64_t offset, bool interleaved) {
  rope_inplace(q, k, cos, sin, {}, {}, offset, {}, interleaved, false);
}

}  // namespace

#define PYT_ROPE_ARGUMENTS                                                                                                     \
  "Tensor cos, Tensor sin, Tensor? positions, Tensor? sequence_offsets, SymInt offset, Tensor? cu_seqlens, bool interleaved, " \
  "bool reverse"

void define_rope_ops(torch::stable::detail::StableLibrary& library) {
  library.def("rope(Tensor q, Tensor? k, " PYT_ROPE_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("rope_(Tensor(a!) q, Tensor(b!)? k, " PYT_ROPE_ARGUMENTS ") -> ()");
  library.def("rope_at(Tensor q, Tensor? k, Tensor cos, Tensor sin, SymInt offset, bool interleaved) -> (Tensor, Tensor)");
  library.def("rope_at_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, SymInt offset, bool interleaved) -> ()");
}

void implement_rope_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("rope_", TORCH_BOX(&rope_inplace));
  library.impl("rope_at", TORCH_BOX(&rope_at));
  library.impl("rope_at_", TORCH_BOX(&rope_at_inplace));
}

}  // namespace pytransformer
