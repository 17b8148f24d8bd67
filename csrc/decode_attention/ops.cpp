#include "ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "decode_attention.h"

namespace pytransformer {
namespace {

constexpr int64_t kUnlimited = 1 << 30;

// The arguments as they came.
struct Arguments {
  Facts q, k_cache, v_cache, cache_seqlens;
  OptionalFacts cu_seqlens_q;
  std::optional<int64_t> max_seqlen_q;
  OptionalFacts block_table, cache_batch_idx, cache_leftpad, mask, bias, alibi_slopes, sinks, k_scale, v_scale;

  bool is_packed() const { return cu_seqlens_q.has_value(); }
  int64_t num_heads() const { return q.size(-2); }
  int64_t batch() const { return cache_seqlens.size(0); }
};

// --- Checks ---------------------------------------------------------------------------------------------------------------------------

void check_head_dim(const char* name, const Facts& tensor) {
  const int64_t dim = tensor.size(-1);
  PYT_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, name, " must have a head_dim that is a multiple of 8 from 8 to 256, got ", dim);
  check_rows_contiguous(name, tensor);
}

void check_q_and_caches(const Arguments& call) {
  const int64_t rank = call.is_packed() ? 3 : 4;
  PYT_CHECK(call.q.dim == rank, "q must have ", rank, " dimensions, got shape ", call.q.shape.text());
  check_floating_16("q", call.q);
  for (const auto& [name, cache] : {std::pair{"k_cache", &call.k_cache}, {"v_cache", &call.v_cache}}) {
    PYT_CHECK(cache->dim == 4, name, " must have 4 dimensions, got shape ", cache->shape.text());
    PYT_CHECK(cache->type == call.q.type || cache->is_quantised(), name, " must have the dtype of q, or be int8 or float8_e4m3fn, got ",
              name_of(cache->type));
    check_device(name, *cache, call.q);
  }
  PYT_CHECK(call.v_cache.type == call.k_cache.type, "v_cache must have the dtype of k_cache");
  check_head_dim("q", call.q);
  check_head_dim("k_cache", call.k_cache);
  check_head_dim("v_cache", call.v_cache);
  PYT_CHECK(call.k_cache.size(3) == call.q.size(-1), "k_cache must have the head_dim of q, got shape ", call.k_cache.shape.text());
  PYT_CHECK(call.v_cache.shape.leading() == call.k_cache.shape.leading(), "v_cache must have shape ", call.k_cache.shape.text(),
            " up to its head_dim, got ", call.v_cache.shape.text());
  const int64_t kv_heads = call.k_cache.size(2);
  PYT_CHECK(call.num_heads() > 0 && kv_heads > 0 && call.num_heads() % kv_heads == 0, "the heads of q (", call.num_heads(),
            ") must be a multiple of those of k_cache (", kv_heads, ")");
}

// int32, contiguous, with `count` elements.
void check_index(const char* name, const Facts& index, int64_t count, const Facts& q) {
  PYT_CHECK(index.type == ScalarType::Int && index.dim == 1 && index.size(0) == count && index.tensor.is_contiguous(), name,
            " must be int32, contiguous, of shape (", count, "), got ", name_of(index.type), " of shape ", index.shape.text());
  check_device(name, index, q);
}

void check_places(const Arguments& call) {
  PYT_CHECK(call.cache_seqlens.dim == 1, "cache_seqlens must have 1 dimension, got shape ", call.cache_seqlens.shape.text());
  const int64_t batch = call.is_packed() ? call.batch() : call.q.size(0);
  check_index("cache_seqlens", call.cache_seqlens, batch, call.q);
  if (call.is_packed()) check_index("cu_seqlens_q", *call.cu_seqlens_q, batch + 1, call.q);
  PYT_CHECK(!call.max_seqlen_q || (call.is_packed() && *call.max_seqlen_q >= 0), "max_seqlen_q is for packed queries and not negative");
  if (call.cache_leftpad) check_index("cache_leftpad", *call.cache_leftpad, batch, call.q);
  if (call.cache_batch_idx) check_index("cache_batch_idx", *call.cache_batch_idx, batch, call.q);
  PYT_CHECK(!call.block_table || !call.cache_batch_idx, "cache_batch_idx is for contiguous caches, block_table for pages: one of them");
  if (call.block_table) {
    const Facts& table = *call.block_table;
    PYT_CHECK(table.type == ScalarType::Int && table.dim == 2 && table.size(0) == batch, "block_table must be int32 of shape (",
              batch, ", pages), got ", name_of(table.type), " of shape ", table.shape.text());
    check_device("block_table", table, call.q);
    check_rows_contiguous("block_table", table);
    PYT_CHECK(call.k_cache.size(1) > 0, "k_cache must have pages of at least 1 slot, got shape ", call.k_cache.shape.text());
  } else if (!call.cache_batch_idx) {
    PYT_CHECK(call.k_cache.size(0) == batch, "k_cache must have ", batch, " rows without block_table and cache_batch_idx, got shape ",
              call.k_cache.shape.text());
  }
}

void check_scales(const Arguments& call) {
  const bool wanted = call.k_cache.is_quantised();
  PYT_CHECK(call.k_scale.has_value() == wanted && call.v_scale.has_value() == wanted,
            wanted ? "k_scale and v_scale must be given with int8 and float8_e4m3fn caches"
                   : "k_scale and v_scale are for int8 and float8_e4m3fn caches");
  if (!wanted) return;
  for (const auto& [name, scale] : {std::pair{"k_scale", &*call.k_scale}, {"v_scale", &*call.v_scale}}) {
    const bool fits = scale->shape == Shape{call.k_cache.size(2)} || scale->shape == call.k_cache.shape.leading();
    PYT_CHECK(fits && scale->type == ScalarType::Float, name, " must be float32, of shape (kv_heads) or that of the cache without its last dimension, got ",
              name_of(scale->type), " of shape ", scale->shape.text());
    check_device(name, *scale, call.q);
  }
  PYT_CHECK(call.k_scale->dim == call.v_scale->dim, "k_scale and v_scale must both be per head or both per token");
}

// Four dimensions, expanded: (batch, heads, queries, keys).
void check_score_shape(const char* name, const Facts& scores, const Arguments& call) {
  const int64_t queries = call.is_packed() ? call.max_seqlen_q.value_or(0) : call.q.size(1);
  const bool fits = scores.dim == 4 && scores.size(0) == call.batch() && scores.size(1) == call.num_heads() &&
                    (call.is_packed() ? scores.size(2) >= queries : scores.size(2) == queries);
  PYT_CHECK(fits, name, " must be expanded to (batch, heads, queries, keys) = (", call.batch(), ", ", call.num_heads(), ", ", queries,
            ", …), got shape ", scores.shape.text());
  check_device(name, scores, call.q);
}

void check_score_terms(const Arguments& call) {
  if (call.mask) {
    PYT_CHECK(call.mask->type == ScalarType::Bool, "mask must be boolean, got ", name_of(call.mask->type));
    check_score_shape("mask", *call.mask, call);
  }
  if (call.bias) {
    check_floating("bias", *call.bias);
    check_score_shape("bias", *call.bias, call);
  }
  if (call.alibi_slopes) {
    const Facts& slopes = *call.alibi_slopes;
    check_floating("alibi_slopes", slopes);
    PYT_CHECK((slopes.dim == 1 || (slopes.dim == 2 && slopes.size(0) == call.batch())) && slopes.size(-1) == call.num_heads(),
              "alibi_slopes must have shape (heads) or (batch, heads), got ", slopes.shape.text());
    check_rows_contiguous("alibi_slopes", slopes);
    check_device("alibi_slopes", slopes, call.q);
  }
  if (call.sinks) {
    check_floating("sinks", *call.sinks);
    PYT_CHECK(call.sinks->dim == 1 && call.sinks->size(0) == call.num_heads(), "sinks must have shape (heads) = (", call.num_heads(),
              "), got ", call.sinks->shape.text());
    check_rows_contiguous("sinks", *call.sinks);
    check_device("sinks", *call.sinks, call.q);
  }
}

// --- The call as the kernels take it ----------------------------------------------------------------------------------------------------

// 16 or 8 where every row begins at such an address and is so long, else 0: element by element.
int vector_bytes(const Facts& tensor, int64_t itemsize) {
  int64_t bits = reinterpret_cast<int64_t>(tensor.data()) | tensor.size(-1) * itemsize;
  for (int64_t i = 0; i < tensor.dim - 1; ++i) bits |= tensor.size(i) > 1 ? tensor.stride(i) * itemsize : 0;
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 0;
}

void set_rows(const Arguments& from, DecodeAttention& call) {
  call.q = from.q.data();
  call.stride_q_batch = from.is_packed() ? 0 : from.q.stride(0);
  call.stride_q_token = from.q.stride(-3);
  call.stride_q_head = from.q.stride(-2);
  call.k = from.k_cache.data();
  call.stride_k_page = from.k_cache.stride(0);
  call.stride_k_token = from.k_cache.stride(1);
  call.stride_k_head = from.k_cache.stride(2);
  call.v = from.v_cache.data();
  call.stride_v_page = from.v_cache.stride(0);
  call.stride_v_token = from.v_cache.stride(1);
  call.stride_v_head = from.v_cache.stride(2);
  const int64_t cache_itemsize = from.k_cache.is_quantised() ? 1 : 2;
  call.q_vector_bytes = vector_bytes(from.q, 2);
  call.k_vector_bytes = vector_bytes(from.k_cache, cache_itemsize);
  call.v_vector_bytes = vector_bytes(from.v_cache, cache_itemsize);
  call.type = element_type(from.q.type);
  call.cache_type = element_type(from.k_cache.type);
}

void set_places(const Arguments& from, DecodeAttention& call) {
  call.cache_seqlens = from.cache_seqlens.data<int32_t>();
  call.cu_seqlens_q = data_of<int32_t>(from.cu_seqlens_q);
  call.cache_leftpad = data_of<int32_t>(from.cache_leftpad);
  call.cache_batch_idx = data_of<int32_t>(from.cache_batch_idx);
  call.block_table = data_of<int32_t>(from.block_table);
  if (from.block_table) call.stride_block_table = from.block_table->stride(0);
}

struct ScaleStrides {
  int64_t &page, &token, &head;
};

const float* scale_pointer(const OptionalFacts& scale, ScaleStrides strides) {
  if (!scale) return nullptr;
  strides.head = scale->stride(-1);
  strides.page = scale->dim == 3 ? scale->stride(0) : 0;
  strides.token = scale->dim == 3 ? scale->stride(1) : 0;
  return scale->data<float>();
}

void set_score_terms(const Arguments& from, DecodeAttention& call) {
  call.k_scale = scale_pointer(from.k_scale, {call.stride_k_scale_page, call.stride_k_scale_token, call.stride_k_scale_head});
  call.v_scale = scale_pointer(from.v_scale, {call.stride_v_scale_page, call.stride_v_scale_token, call.stride_v_scale_head});
  call.scale_per_token = from.k_scale && from.k_scale->dim == 3;
  if (from.mask) {
    call.mask = from.mask->data<uint8_t>();
    call.mask_rows = static_cast<int>(from.mask->size(2));
    call.stride_mask_batch = from.mask->stride(0);
    call.stride_mask_head = from.mask->stride(1);
    call.stride_mask_token = from.mask->stride(2);
    call.stride_mask_key = from.mask->stride(3);
  }
  if (from.bias) {
    call.bias = from.bias->data();
    call.bias_type = element_type(from.bias->type);
    call.bias_rows = static_cast<int>(from.bias->size(2));
    call.stride_bias_batch = from.bias->stride(0);
    call.stride_bias_head = from.bias->stride(1);
    call.stride_bias_token = from.bias->stride(2);
    call.stride_bias_key = from.bias->stride(3);
  }
  if (from.alibi_slopes) {
    call.alibi_slopes = from.alibi_slopes->data();
    call.alibi_type = element_type(from.alibi_slopes->type);
    call.stride_alibi_batch = from.alibi_slopes->dim == 2 ? from.alibi_slopes->stride(0) : 0;
  }
  if (from.sinks) {
    call.sinks = from.sinks->data();
    call.sinks_type = element_type(from.sinks->type);
  }
}

void check_fits_32_bits(const char* what, int64_t value) {
  PYT_CHECK(value < kUnlimited, what, " must be less than 2^30, got ", value);
}

void set_sizes(const Arguments& from, DecodeAttention& call) {
  const int64_t pages = from.block_table ? from.block_table->size(1) : 1;
  const int64_t capacity = pages * from.k_cache.size(1);
  int64_t num_keys = capacity;
  if (from.mask) num_keys = std::min(num_keys, from.mask->size(3));
  if (from.bias) num_keys = std::min(num_keys, from.bias->size(3));
  const int64_t tokens = from.q.size(-3);
  const int64_t group = from.num_heads() / from.k_cache.size(2);
  check_fits_32_bits("the capacity of the cache", capacity);
  check_fits_32_bits("query tokens times heads per key head", tokens * group);
  check_fits_32_bits("the batch", from.batch());
  call.batch = static_cast<int>(from.batch());
  call.num_kv_heads = static_cast<int>(from.k_cache.size(2));
  call.group = static_cast<int>(group);
  call.head_dim = static_cast<int>(from.k_cache.size(3));
  call.value_dim = static_cast<int>(from.v_cache.size(3));
  call.page_size = from.block_table ? static_cast<int>(from.k_cache.size(1)) : 0;
  call.capacity = static_cast<int>(capacity);
  call.num_keys = static_cast<int>(num_keys);
  call.total_q = static_cast<int>(tokens);
  call.seqlen_q = static_cast<int>(std::min(tokens, from.max_seqlen_q.value_or(tokens)));
}

// Output, lse and scratch; rows of packed q behind the last sequence belong to none, and no program visits them.
std::tuple<Tensor, Tensor> allocate(const Arguments& from, DecodeAttention& call) {
  std::vector<int64_t> shape(from.q.shape.begin(), from.q.shape.end()), lse_shape;
  shape.back() = call.value_dim;
  if (from.is_packed()) {
    lse_shape = {from.num_heads(), from.q.size(0)};
  } else {
    lse_shape = {from.q.size(0), from.num_heads(), from.q.size(1)};
  }
  Tensor out = empty(from.q, shape, from.q.type), lse = empty(from.q, lse_shape, ScalarType::Float);
  if (from.is_packed()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  call.out = out.mutable_data_ptr();
  call.stride_out_head = call.value_dim;
  call.stride_out_token = from.num_heads() * call.stride_out_head;
  call.stride_out_batch = from.is_packed() ? 0 : from.q.size(1) * call.stride_out_token;
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.stride_lse_head = lse_shape.back();
  call.stride_lse_batch = from.is_packed() ? 0 : from.num_heads() * call.stride_lse_head;
  return {out, lse};
}

// Zeros that a launch leaves zero. Launches of one stream run one after another and share theirs. A launch that is captured into a CUDA
// graph gets its own, which the graph clears before: two graphs may run beside each other.
Tensor counters_of(const Facts& like, int64_t count, const LaunchScope& scope) {
  const auto zeros = [&] {
    Tensor tensor = empty(like, {count}, ScalarType::Int);
    torch::stable::zero_(tensor);
    return tensor;
  };
  if (scope.is_capturing()) return zeros();
  static std::mutex mutex;
  static auto& kept = *new std::map<std::pair<int32_t, void*>, Tensor>;  // never destroyed: at exit the driver may be gone
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = kept.try_emplace({like.device_index, scope.stream()}, Tensor());
  if (is_new || entry->second.numel() < count) entry->second = zeros();
  return entry->second;
}

std::tuple<Tensor, Tensor> decode_attention_op(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, OptionalTensor cu_seqlens_q, std::optional<int64_t> max_seqlen_q,
    OptionalTensor block_table, OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale, double softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, double softcap, int64_t num_splits) {
  const Arguments from{Facts(q), Facts(k_cache), Facts(v_cache), Facts(cache_seqlens), facts_of(cu_seqlens_q), max_seqlen_q,
                       facts_of(block_table), facts_of(cache_batch_idx), facts_of(cache_leftpad), facts_of(mask), facts_of(bias),
                       facts_of(alibi_slopes), facts_of(sinks), facts_of(k_scale), facts_of(v_scale)};
  check_q_and_caches(from);
  check_places(from);
  check_scales(from);
  check_score_terms(from);
  PYT_CHECK(std::isfinite(softmax_scale), "softmax_scale must be finite, got ", softmax_scale);
  PYT_CHECK(std::isfinite(softcap) && softcap >= 0.0, "softcap must be finite and at least 0, got ", softcap);
  PYT_CHECK(window_left >= -1 && window_right >= -1, "window must be at least -1, got (", window_left, ", ", window_right, ")");
  PYT_CHECK(num_splits >= 0, "num_splits must be at least 0, got ", num_splits);
  DecodeAttention call{};
  set_sizes(from, call);
  set_rows(from, call);
  set_places(from, call);
  set_score_terms(from, call);
  call.softmax_scale = static_cast<float>(softmax_scale);
  call.softcap = static_cast<float>(softcap);
  call.window_left = window_left < kUnlimited ? static_cast<int>(window_left) : -1;
  call.window_right = causal ? 0 : window_right < kUnlimited ? static_cast<int>(window_right) : -1;
  DecodeClass classes[kMaxDecodeClasses];
  const int count = decode_classes(call, static_cast<int>(std::min(num_splits, kUnlimited)), classes);
  for (int i = 0; i < count; ++i) {
    PYT_CHECK(classes[i].max_splits > 1 || int64_t(call.batch) * call.num_kv_heads * classes[i].num_tiles <= std::numeric_limits<int32_t>::max(),
              "the call is too large for one launch: pass max_seqlen_q");
  }

  const auto [out, lse] = allocate(from, call);
  if (call.batch == 0 || out.numel() == 0) return {out, lse};
  const LaunchScope scope(q);
  for (int i = 0; i < count; ++i) {
    DecodeClass& programs = classes[i];
    std::optional<Tensor> scratch, counters;  // alive until the launch is queued
    if (programs.max_splits > 1) {
      scratch = empty(from.q, {scratch_size(programs, call.value_dim)}, ScalarType::Float);
      counters = counters_of(from.q, programs.num_programs, scope);
      programs.scratch = static_cast<float*>(scratch->mutable_data_ptr());
      programs.counters = static_cast<int32_t*>(counters->mutable_data_ptr());
    }
    decode_attention(call, programs, scope.stream());
  }
  return {out, lse};
}

}  // namespace

void define_decode_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? cu_seqlens_q, SymInt? max_seqlen_q, "
      "Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? k_scale, Tensor? v_scale, float softmax_scale, bool causal, SymInt window_left, SymInt window_right, "
      "float softcap, SymInt num_splits) -> (Tensor, Tensor)");
}

void implement_decode_attention_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("decode_attention", TORCH_BOX(&decode_attention_op));
}

}  // namespace pytransformer
