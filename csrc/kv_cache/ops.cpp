#include "ops.h"

#include <cmath>

#include "../common/overlap.h"
#include "kv_append.h"

namespace pytransformer {
namespace {

struct Arguments {
  Facts k, v, k_cache, v_cache;
  OptionalFacts k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx, positions, cos, sin, q, q_norm_weight,
      k_norm_weight;
  bool interleaved;
  double norm_eps, norm_weight_offset;

  bool packed() const { return k.dim == 3; }
  int64_t rows() const { return packed() ? 1 : k.size(0); }
  int64_t seqlen() const { return k.size(-3); }
  int64_t tokens() const { return rows() * seqlen(); }
};

bool same_leading(const Facts& x, const Facts& k) { return x.dim == k.dim && x.shape.leading().leading() == k.shape.leading().leading(); }

void check_new(const Arguments& given) {
  const Facts &k = given.k, &v = given.v;
  check_floating("k", k);
  PYT_CHECK(k.dim == 3 || k.dim == 4, "k must have 3 or 4 dimensions, got shape ", k.shape.text());
  PYT_CHECK(v.type == k.type, "v must have the dtype of k, ", name_of(k.type), ", got ", name_of(v.type));
  PYT_CHECK(same_leading(v, k) && v.size(-2) == k.size(-2), "v must have the shape of k but for head_dim, got ", v.shape.text(), " and ", k.shape.text());
  check_device("v", v, k);
  if (given.q) {
    const Facts& q = *given.q;
    PYT_CHECK(q.type == k.type, "q must have the dtype of k, ", name_of(k.type), ", got ", name_of(q.type));
    PYT_CHECK(same_leading(q, k) && q.size(-1) == k.size(-1), "q must have the shape of k but for the heads, got ", q.shape.text(), " and ", k.shape.text());
    PYT_CHECK(q.size(-2) > 0, "q must have at least one head");
    check_device("q", q, k);
    check_rows_contiguous("q", q);
  }
  PYT_CHECK(k.size(-2) > 0, "k must have at least one head");
  for (const Facts* x : {&k, &v}) {
    const int64_t head_dim = x->size(-1);
    PYT_CHECK(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256, "head_dim must be a multiple of 8 from 8 to 256, got ", head_dim);
    check_rows_contiguous(x == &k ? "k" : "v", *x);
  }
  constexpr int64_t kMax = int64_t{1} << 28;
  PYT_CHECK(given.tokens() < 4 * kMax && k.size(-2) < kMax && (!given.q || given.q->size(-2) < kMax), "too many tokens or heads in k ",
            k.shape.text(), " or q");
}

void check_cache(const char* name, const Facts& cache, const Facts& x) {
  PYT_CHECK(cache.is_quantised() || cache.type == x.type, name, " must have the dtype of k, ", name_of(x.type), ", or int8 or float8_e4m3fn, got ",
            name_of(cache.type));
  PYT_CHECK(cache.dim == 4 && cache.size(2) == x.size(-2) && cache.size(3) == x.size(-1), name,
            " must be (pages, page_size, num_kv_heads, head_dim) for the heads of ", x.shape.text(), ", got ", cache.shape.text());
  check_device(name, cache, x);
  check_rows_contiguous(name, cache);
  check_written(name, cache);
}

void check_scale(const char* name, const OptionalFacts& scale, const Facts& cache, bool per_token) {
  PYT_CHECK(scale, name, " must be given with a quantised cache");
  check_type(name, *scale, ScalarType::Float);
  check_device(name, *scale, cache);
  if (per_token) {
    PYT_CHECK(scale->shape == cache.shape.leading(), name, " must have shape cache.shape[:-1], got ", scale->shape.text());
    check_written(name, *scale);
  } else {
    check_shape(name, *scale, {cache.size(2)});
  }
}

void check_caches(const Arguments& given, bool scale_per_token) {
  const Facts &k_cache = given.k_cache, &v_cache = given.v_cache;
  check_cache("k_cache", k_cache, given.k);
  check_cache("v_cache", v_cache, given.v);
  PYT_CHECK(v_cache.type == k_cache.type, "v_cache must have the dtype of k_cache");
  PYT_CHECK(v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1), "v_cache must have the shape of k_cache but for head_dim");
  if (k_cache.is_quantised()) {
    check_scale("k_scale", given.k_scale, k_cache, scale_per_token);
    check_scale("v_scale", given.v_scale, v_cache, scale_per_token);
  } else {
    PYT_CHECK(!given.k_scale && !given.v_scale, "k_scale and v_scale are for quantised caches");
  }
}

// A vector of `size` int32.
const int32_t* int32_vector(const char* name, const Facts& tensor, int64_t size, const Facts& first) {
  check_type(name, tensor, ScalarType::Int);
  check_shape(name, tensor, {size});
  check_rows_contiguous(name, tensor);
  check_device(name, tensor, first);
  return tensor.data<int32_t>();
}

struct TokenStrides {
  int64_t batch, token;
};

// One entry for each token: flat, or in the shape of k's first dimensions, or (`shared`) one row for all sequences.
TokenStrides per_token(const char* name, const Facts& tensor, const Arguments& given, bool shared) {
  check_device(name, tensor, given.k);
  const int64_t seqlen = given.seqlen();
  if (!given.packed() && tensor.shape == Shape{given.rows(), seqlen}) return {tensor.stride(0), tensor.stride(1)};
  if (shared && !given.packed() && tensor.shape == Shape{seqlen}) return {0, tensor.stride(0)};
  PYT_CHECK(tensor.shape == Shape{given.tokens()}, name, " must have an entry for each token, got shape ", tensor.shape.text());
  return {tensor.stride(0) * seqlen, tensor.stride(0)};
}

void take_slots(KvAppend& call, const Arguments& given) {
  PYT_CHECK(!given.block_table && !given.cache_batch_idx, "block_table and cache_batch_idx go with cache_seqlens, not with slot_mapping");
  check_type("slot_mapping", *given.slot_mapping, ScalarType::Long);
  const TokenStrides strides = per_token("slot_mapping", *given.slot_mapping, given, false);
  call.slot_mapping = given.slot_mapping->data<int64_t>();
  call.stride_slot_batch = strides.batch;
  call.stride_slot_token = strides.token;
  if (given.cu_seqlens) {  // says nothing that the slots do not
    PYT_CHECK(given.packed() && given.cu_seqlens->dim == 1 && given.cu_seqlens->type == ScalarType::Int,
              "cu_seqlens must be int32 (batch + 1), with packed k");
    check_device("cu_seqlens", *given.cu_seqlens, given.k);
  }
}

void take_lengths(KvAppend& call, const Arguments& given) {
  const Facts& lengths = *given.cache_seqlens;
  PYT_CHECK(lengths.dim == 1, "cache_seqlens must have shape (batch), got ", lengths.shape.text());
  const int64_t batch = lengths.size(0);
  call.cache_seqlens = int32_vector("cache_seqlens", lengths, batch, given.k);
  call.batch = static_cast<int>(batch);
  PYT_CHECK(given.packed() == given.cu_seqlens.has_value(), "cu_seqlens goes with packed k, got k of shape ", given.k.shape.text());
  if (given.cu_seqlens) {
    call.cu_seqlens = int32_vector("cu_seqlens", *given.cu_seqlens, batch + 1, given.k);
    PYT_CHECK(batch > 0 || given.tokens() == 0, "cu_seqlens names no sequence for ", given.tokens(), " tokens");
  } else {
    check_shape("cache_seqlens", lengths, {given.rows()});
  }
  if (given.block_table) {
    const Facts& table = *given.block_table;
    PYT_CHECK(!given.cache_batch_idx, "cache_batch_idx is for contiguous caches, block_table for pages");
    check_type("block_table", table, ScalarType::Int);
    PYT_CHECK(table.dim == 2 && table.size(0) == batch, "block_table must have shape (", batch, ", max_pages), got ", table.shape.text());
    check_rows_contiguous("block_table", table);
    check_device("block_table", table, given.k);
    call.block_table = table.data<int32_t>();
    call.stride_table = table.stride(0);
    call.max_pages = table.size(1);
  } else if (given.cache_batch_idx) {
    call.cache_batch_idx = int32_vector("cache_batch_idx", *given.cache_batch_idx, batch, given.k);
  } else {
    PYT_CHECK(given.k_cache.size(0) == batch, "k_cache must have ", batch, " rows, got shape ", given.k_cache.shape.text());
  }
  PYT_CHECK(given.k_cache.size(1) > 0 || given.tokens() == 0, "k_cache has no room for tokens, shape ", given.k_cache.shape.text());
}

void take_rope(KvAppend& call, const Arguments& given) {
  PYT_CHECK(given.cos.has_value() == given.sin.has_value(), "cos and sin go together");
  if (given.positions) {
    check_int32_or_int64("positions", *given.positions);
    const TokenStrides strides = per_token("positions", *given.positions, given, true);
    call.positions = given.positions->data();
    call.positions_64 = given.positions->type == ScalarType::Long;
    call.stride_positions_batch = strides.batch;
    call.stride_positions_token = strides.token;
  }
  if (!given.cos) return;
  const Facts &cos = *given.cos, &sin = *given.sin;
  check_rope_tables(cos, sin, given.k, given.k.size(-1));
  PYT_CHECK(cos.size(0) > 0 || given.tokens() == 0, "cos has no rows");
  PYT_CHECK(given.positions || !given.slot_mapping, "positions must be given with slot_mapping and cos");
  call.cos = cos.data<float>();
  call.sin = sin.data<float>();
  call.stride_cos = cos.stride(0);
  call.stride_sin = sin.stride(0);
  call.length = cos.size(0);
  call.rotary_dim = static_cast<int>(2 * cos.size(1));
  call.interleaved = given.interleaved;
}

NormWeight norm_weight(const char* name, const OptionalFacts& weight, const Facts& k) {
  if (!weight) return {};
  check_floating(name, *weight);
  check_shape(name, *weight, {k.size(-1)});
  check_rows_contiguous(name, *weight);
  check_device(name, *weight, k);
  return {weight->data(), element_type(weight->type)};
}

void take_norms(KvAppend& call, const Arguments& given) {
  PYT_CHECK(std::isfinite(given.norm_eps) && given.norm_eps >= 0 && std::isfinite(given.norm_weight_offset),
            "norm_eps must be at least 0 and norm_weight_offset finite");
  PYT_CHECK(!given.q_norm_weight || given.q, "q_norm_weight is given without q");
  call.q_norm = norm_weight("q_norm_weight", given.q_norm_weight, given.k);
  call.k_norm = norm_weight("k_norm_weight", given.k_norm_weight, given.k);
  call.norm_eps = static_cast<float>(given.norm_eps);
  call.norm_weight_offset = static_cast<float>(given.norm_weight_offset);
}

NewTokens new_tokens(const Facts& x) {
  return {x.data(), x.dim == 3 ? 0 : x.stride(0), x.stride(-3), x.stride(-2), static_cast<int>(x.size(-2)), static_cast<int>(x.size(-1))};
}

Cache cache_of(const Facts& cache, const OptionalFacts& scale) {
  Cache result{cache.tensor.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2), nullptr, 0, 0, 0};
  if (!scale) return result;
  if (scale->dim == 1) {  // read
    result.scale = const_cast<float*>(scale->data<float>());
    result.stride_scale_head = scale->stride(0);
  } else {
    result.scale = static_cast<float*>(scale->tensor.mutable_data_ptr());
    result.stride_scale_page = scale->stride(0);
    result.stride_scale_token = scale->stride(1);
    result.stride_scale_head = scale->stride(2);
  }
  return result;
}

// What is written shares no element with anything else.
void check_memory(const Arguments& given, bool scale_per_token) {
  const OptionalFacts none;
  const OptionalFacts &k_made = scale_per_token ? given.k_scale : none, &v_made = scale_per_token ? given.v_scale : none;
  const OptionalFacts &k_read = scale_per_token ? none : given.k_scale, &v_read = scale_per_token ? none : given.v_scale;
  check_apart({{"k_cache", given.k_cache}, {"v_cache", given.v_cache}, {"k_scale", k_made}, {"v_scale", v_made}},
              {{"k", given.k},
               {"v", given.v},
               {"k_scale", k_read},
               {"v_scale", v_read},
               {"cache_seqlens", given.cache_seqlens},
               {"slot_mapping", given.slot_mapping},
               {"block_table", given.block_table},
               {"cu_seqlens", given.cu_seqlens},
               {"cache_batch_idx", given.cache_batch_idx},
               {"positions", given.positions},
               {"cos", given.cos},
               {"sin", given.sin},
               {"q", given.q},
               {"q_norm_weight", given.q_norm_weight},
               {"k_norm_weight", given.k_norm_weight}});
}

// The new q, where there is a q.
std::optional<Tensor> append(const Arguments& given, bool scale_per_token) {
  check_new(given);
  check_caches(given, scale_per_token);
  PYT_CHECK(given.cache_seqlens.has_value() != given.slot_mapping.has_value(), "give cache_seqlens or slot_mapping, and not both");
  constexpr int64_t kMaxPageSize = (int64_t{1} << 32) - 1;
  PYT_CHECK(given.k_cache.size(1) <= kMaxPageSize, "k_cache has too many tokens in a row");
  KvAppend call{};
  if (given.slot_mapping) {
    take_slots(call, given);
  } else {
    take_lengths(call, given);
  }
  take_rope(call, given);
  take_norms(call, given);
  check_memory(given, scale_per_token);
  std::optional<Tensor> new_q;
  if (given.q) new_q = empty(*given.q, given.q->shape, given.q->type);
  if (given.tokens() == 0) return new_q;
  call.k = new_tokens(given.k);
  call.v = new_tokens(given.v);
  if (given.q) {
    call.q = new_tokens(*given.q);
    call.new_q = new_q->mutable_data_ptr();
  }
  call.k_cache = cache_of(given.k_cache, given.k_scale);
  call.v_cache = cache_of(given.v_cache, given.v_scale);
  call.page_size = given.k_cache.size(1) > 0 ? given.k_cache.size(1) : 1;  // the kernel divides by it
  call.pages = given.k_cache.size(1) > 0 ? given.k_cache.size(0) : 0;
  call.tokens = static_cast<unsigned>(given.tokens());
  call.seqlen = static_cast<unsigned>(given.seqlen());
  call.type = element_type(given.k.type);
  call.cache_type = element_type(given.k_cache.type);
  call.scale_per_token = scale_per_token;
  const LaunchScope scope(given.k.tensor);
  kv_append(call, scope.stream());
  return new_q;
}

template <bool SCALE_PER_TOKEN>
Tensor append_op(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, OptionalTensor k_scale, OptionalTensor v_scale,
                 OptionalTensor cache_seqlens, OptionalTensor slot_mapping, OptionalTensor block_table, OptionalTensor cu_seqlens,
                 OptionalTensor cache_batch_idx, OptionalTensor positions, OptionalTensor cos, OptionalTensor sin, OptionalTensor q,
                 OptionalTensor q_norm_weight, OptionalTensor k_norm_weight, bool interleaved, double norm_eps, double norm_weight_offset) {
  const Arguments given{Facts(k), Facts(v), Facts(k_cache), Facts(v_cache), facts_of(k_scale), facts_of(v_scale), facts_of(cache_seqlens),
                        facts_of(slot_mapping), facts_of(block_table), facts_of(cu_seqlens), facts_of(cache_batch_idx), facts_of(positions),
                        facts_of(cos), facts_of(sin), facts_of(q), facts_of(q_norm_weight), facts_of(k_norm_weight), interleaved, norm_eps,
                        norm_weight_offset};
  std::optional<Tensor> new_q = append(given, SCALE_PER_TOKEN);
  return new_q ? std::move(*new_q) : empty(given.k, {0}, given.k.type);
}

// The schema says what is written: per-token scales are, scales per head are not.
Tensor append_scaled_op(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_scale, Tensor v_scale, OptionalTensor cache_seqlens,
                        OptionalTensor slot_mapping, OptionalTensor block_table, OptionalTensor cu_seqlens, OptionalTensor cache_batch_idx,
                        OptionalTensor positions, OptionalTensor cos, OptionalTensor sin, OptionalTensor q, OptionalTensor q_norm_weight,
                        OptionalTensor k_norm_weight, bool interleaved, double norm_eps, double norm_weight_offset) {
  return append_op<true>(k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx,
                         positions, cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset);
}

// The calls of most decode steps. Each absent argument of the general op costs its caller as much as a dictionary look-up: these have few.
// `where` is slot_mapping if it is int64, else cache_seqlens.
Arguments few(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& where,
              const OptionalTensor& block_table) {
  Arguments given{Facts(k), Facts(v), Facts(k_cache), Facts(v_cache), {}, {}, {}, {}, facts_of(block_table), {}, {}, {}, {}, {}, {}, {}, {},
                  false, 0.0, 0.0};
  (where.scalar_type() == ScalarType::Long ? given.slot_mapping : given.cache_seqlens).emplace(where);
  return given;
}

void store_op(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor where, OptionalTensor block_table) {
  append(few(k, v, k_cache, v_cache, where, block_table), false);
}

Tensor rotate_store_op(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor where, OptionalTensor block_table, Tensor cos,
                       Tensor sin, OptionalTensor positions, bool interleaved) {
  Arguments given = few(k, v, k_cache, v_cache, where, block_table);
  given.q.emplace(q);
  given.cos.emplace(cos);
  given.sin.emplace(sin);
  if (positions) given.positions.emplace(*positions);
  given.interleaved = interleaved;
  return *append(given, false);
}

}  // namespace

#define PYT_APPEND_CACHES "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
#define PYT_APPEND_OPTIONS                                                                                                                  \
  "Tensor? cache_seqlens, Tensor? slot_mapping, Tensor? block_table, Tensor? cu_seqlens, Tensor? cache_batch_idx, Tensor? positions, "      \
  "Tensor? cos, Tensor? sin, Tensor? q, Tensor? q_norm_weight, Tensor? k_norm_weight, bool interleaved, float norm_eps, "                   \
  "float norm_weight_offset) -> Tensor"

void define_kv_append_ops(torch::stable::detail::StableLibrary& library) {
  library.def("kv_append" PYT_APPEND_CACHES "Tensor? k_scale, Tensor? v_scale, " PYT_APPEND_OPTIONS);
  library.def("kv_append_scaled" PYT_APPEND_CACHES "Tensor(c!) k_scale, Tensor(d!) v_scale, " PYT_APPEND_OPTIONS);
  library.def("kv_store" PYT_APPEND_CACHES "Tensor where, Tensor? block_table) -> ()");
  library.def("kv_rotate_store(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor where, Tensor? block_table, "
              "Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> Tensor");
}

void implement_kv_append_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("kv_append", TORCH_BOX(&append_op<false>));
  library.impl("kv_append_scaled", TORCH_BOX(&append_scaled_op));
  library.impl("kv_store", TORCH_BOX(&store_op));
  library.impl("kv_rotate_store", TORCH_BOX(&rotate_store_op));
}

}  // namespace pytransformer
