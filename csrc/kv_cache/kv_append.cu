// KV-cache append: QK-norm, RoPE, quantisation and the write of new keys and values, in one launch.
//
//     k' = rope(rms_norm(k)),  v' = v,  q' = rope(rms_norm(q));   cache[place of the token] = k', v', or their codes
//
// Cost: k, v and q are read once and written once, a handful of FLOP per element: bound by memory, and for a decode step (a few tokens) by
// nothing but the latency of one small launch.
//
// A row (one head of one token) belongs to a group of `lanes` neighbouring lanes of a warp, each with 8 features: one 16-byte access of 16-bit
// data, two of float32. Sums and maxima go over those lanes. Where a token goes is worked out by every thread for its own token. A token
// without a place (negative slot; a position, page or row that does not exist) is dropped. Results round where the separate operations
// would: norm and rotation each to the dtype of k.
#include <initializer_list>

#include "../common/rope.cuh"
#include "../common/sequences.cuh"
#include "encode.cuh"
#include "kv_append.h"

namespace pytransformer {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kFeatures = 8;  // of a lane

// ------------------------------------------------------------------------------------------------------------------ launch policy

struct Shape {
  int lanes;    // per row: a power of two
  int threads;  // per block
  unsigned blocks_of_tokens;
  int rows;  // heads of q, k and v that a thread takes for its token
  unsigned blocks_of_rows;
};

Shape shape_of(const KvAppend& call) {
  Shape shape{1, kWarpSize, 0, 1, 0};
  const int dim = call.k.dim > call.v.dim ? call.k.dim : call.v.dim;
  while (shape.lanes * kFeatures < dim) shape.lanes *= 2;
  while (shape.threads < kMaxThreads && shape.threads < static_cast<int64_t>(call.tokens) * shape.lanes) shape.threads *= 2;
  shape.blocks_of_tokens = ceil_div(call.tokens, static_cast<unsigned>(shape.threads / shape.lanes));
  // A thread finds its token's place and table row once for all its rows; eight make that small beside the rows themselves. A decode step
  // has too few tokens for it: there the rows are spread until every SM has the eight blocks (64 warps) that it can hold.
  constexpr int kMaxRows = 8;
  const int all_rows = call.q.heads + 2 * call.k.heads;
  const int64_t blocks_wanted = 8 * device_limits().num_sms;
  while (shape.rows < kMaxRows &&
         static_cast<int64_t>(shape.blocks_of_tokens) * ceil_div(all_rows, 2 * shape.rows) >= blocks_wanted) {
    shape.rows *= 2;
  }
  constexpr int kMaxGridY = 65535;
  while (ceil_div(all_rows, shape.rows) > kMaxGridY) shape.rows *= 2;
  shape.blocks_of_rows = static_cast<unsigned>(ceil_div(all_rows, shape.rows));
  return shape;
}

// ------------------------------------------------------------------------------------------------------------------------ kernel

struct Place {
  int64_t page, offset;
  bool exists;
  int64_t position;  // in the sequence; 0 for a token of no sequence
};

// `row` and `column`: where the token stands in k.
__device__ __forceinline__ Place place_of(const KvAppend& call, unsigned token, unsigned row, unsigned column) {
  Place place{0, 0, true, 0};
  if (call.slot_mapping != nullptr) {
    const int64_t slot = call.slot_mapping[row * call.stride_slot_batch + column * call.stride_slot_token];
    place.page = slot / call.page_size;
    place.offset = slot % call.page_size;
    place.exists = slot >= 0 && place.page < call.pages;
    return place;
  }
  int sequence = static_cast<int>(row);
  int64_t index = column;
  if (call.cu_seqlens != nullptr) {
    sequence = find_sequence(call.cu_seqlens, call.batch, token);
    const int32_t start = call.cu_seqlens[sequence];
    place.exists = start <= static_cast<int64_t>(token) && static_cast<int64_t>(token) < call.cu_seqlens[sequence + 1];
    if (!place.exists) return place;  // before the first sequence, or behind the last
    index = token - start;
  }
  place.position = index + call.cache_seqlens[sequence];
  place.exists = place.position >= 0 && place.position < (call.block_table != nullptr ? call.max_pages : 1) * call.page_size;
  if (!place.exists) return place;
  place.offset = place.position;
  place.page = sequence;
  if (call.block_table != nullptr) {
    // Positions fit 32 unsigned bits (two int32 are added), and so does the page size: the short division does.
    const unsigned position = static_cast<unsigned>(place.position), page_size = static_cast<unsigned>(call.page_size);
    place.page = call.block_table[sequence * call.stride_table + position / page_size];
    place.offset = position % page_size;
  } else if (call.cache_batch_idx != nullptr) {
    place.page = call.cache_batch_idx[sequence];
  }
  place.exists = place.page >= 0 && place.page < call.pages;
  return place;
}

// Reduces over groups of `lanes` neighbouring lanes; all threads of the warp call it.
template <class Operation>
__device__ __forceinline__ float reduce_lanes(float value, int lanes, Operation operation) {
#pragma unroll 1
  for (int offset = lanes / 2; offset > 0; offset /= 2) value = operation(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

template <class T>
using Features = Vector<T, kFeatures>;

// 16 bytes at a time, or one feature at a time where memory is not aligned for that.
template <bool ALIGNED, class T>
__device__ __forceinline__ void load_features(Features<T>& x, const T* address) {
  constexpr int STEP = !ALIGNED ? 1 : kVectorLength<T> < kFeatures ? kVectorLength<T> : kFeatures;
#pragma unroll
  for (int i = 0; i < kFeatures; i += STEP) {
    const Vector<T, STEP> part = load_vector<STEP>(address + i);
#pragma unroll
    for (int j = 0; j < STEP; ++j) x.values[i + j] = part.values[j];
  }
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void store_features(T* address, const Features<T>& x) {
  constexpr int STEP = !ALIGNED ? 1 : kVectorLength<T> < kFeatures ? kVectorLength<T> : kFeatures;
#pragma unroll
  for (int i = 0; i < kFeatures; i += STEP) {
    Vector<T, STEP> part;
#pragma unroll
    for (int j = 0; j < STEP; ++j) part.values[j] = x.values[i + j];
    store_vector<STEP>(address + i, part);
  }
}

template <class T>
__device__ __forceinline__ Features<T> zeros() {
  Features<T> x;
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) x.values[i] = from_float<T>(0.0f);
  return x;
}

// The features of another lane; all threads of the warp call it.
template <class T>
__device__ __forceinline__ Features<T> from_lane(const Features<T>& x, int lane) {
  constexpr int WORDS = sizeof(Features<T>) / sizeof(uint32_t);
  uint32_t words[WORDS];
  memcpy(words, &x, sizeof words);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = __shfl_sync(kFullWarp, words[i], lane);
  Features<T> result;
  memcpy(&result, words, sizeof words);
  return result;
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void load_weights(float (&weights)[kFeatures], const void* data, int col) {
  Features<T> loaded;
  load_features<ALIGNED>(loaded, static_cast<const T*>(data) + col);
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) weights[i] = to_float(loaded.values[i]);
}

// QK-norm of a row of `dim` features, of which the lane has those from `col` on; rounded to T before the rotation, as the two operations one
// after the other would. All threads of the warp call it.
template <bool VECTORS, class T>
__device__ __forceinline__ void normalise(const KvAppend& call, const NormWeight& weight, Features<T>& x, int col, int dim, int lanes) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) sum += to_float(x.values[i]) * to_float(x.values[i]);
  const float rstd = rsqrtf(reduce_lanes(sum, lanes, Sum{}) / dim + call.norm_eps);
  if (col >= dim) return;
  float weights[kFeatures];
  if (weight.type == ElementType::float32) {
    load_weights<VECTORS, float>(weights, weight.data, col);
  } else if (weight.type == ElementType::float16) {
    load_weights<VECTORS, float16>(weights, weight.data, col);
  } else {
    load_weights<VECTORS, bfloat16>(weights, weight.data, col);
  }
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    x.values[i] = from_float<T>(to_float(x.values[i]) * rstd * (weights[i] + call.norm_weight_offset));
  }
}

// cos and sin of the lane's features (half layout), or of its pairs (interleaved, the first half of the arrays).
struct Angles {
  float cos[kFeatures], sin[kFeatures];
};

// What rotates is whole vectors in aligned memory.
__device__ __forceinline__ void load_angles(const KvAppend& call, Angles& angles, int64_t position, int col) {
  const float* cos_row = call.cos + position * call.stride_cos;
  const float* sin_row = call.sin + position * call.stride_sin;
  if (call.interleaved) {
    load_table<kFeatures / 2>(angles.cos, cos_row + col / 2);
    load_table<kFeatures / 2>(angles.sin, sin_row + col / 2);
  } else {
    const int half = call.rotary_dim / 2, pair = col < half ? col : col - half;
    load_table<kFeatures>(angles.cos, cos_row + pair);
    load_table<kFeatures>(angles.sin, sin_row + pair);
  }
}

// RoPE where the lane's features rotate all or none. All threads of the warp call it.
template <class T>
__device__ __forceinline__ void rotate_vectors(const KvAppend& call, const Angles& angles, Features<T>& x, int col) {
  const bool rotates = col < call.rotary_dim;
  if (call.interleaved) {
    if (!rotates) return;
#pragma unroll
    for (int i = 0; i < kFeatures / 2; ++i) {
      const float x1 = to_float(x.values[2 * i]), x2 = to_float(x.values[2 * i + 1]);
      x.values[2 * i] = from_float<T>(rotated_first(x1, x2, angles.cos[i], angles.sin[i]));
      x.values[2 * i + 1] = from_float<T>(rotated_second(x1, x2, angles.cos[i], angles.sin[i]));
    }
    return;
  }
  const int distance = call.rotary_dim / 2 / kFeatures, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_first = 2 * col < call.rotary_dim;
  const Features<T> partner = from_lane(x, !rotates ? lane : is_first ? lane + distance : lane - distance);
  if (!rotates) return;
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    const float own = to_float(x.values[i]), other = to_float(partner.values[i]);
    // The second of a pair has the sine of the opposite sign: one formula for both.
    x.values[i] = from_float<T>(rotated_first(own, other, angles.cos[i], is_first ? angles.sin[i] : -angles.sin[i]));
  }
}

// RoPE of any width and alignment, by way of a row of shared memory. All threads of the warp call it.
template <class T>
__device__ __forceinline__ void rotate_any(const KvAppend& call, Features<T>& x, T* shared_row, bool exists, int64_t position, int col) {
  __syncwarp();  // the row before has been read
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) shared_row[col + i] = x.values[i];
  __syncwarp();
  const float* cos_row = call.cos + position * call.stride_cos;
  const float* sin_row = call.sin + position * call.stride_sin;
  const int half = call.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    const int feature = col + i;
    if (exists && feature < call.rotary_dim) {
      const bool is_first = call.interleaved ? i % 2 == 0 : feature < half;
      const int distance = call.interleaved ? 1 : half, partner = is_first ? feature + distance : feature - distance;
      const int pair = call.interleaved ? feature / 2 : is_first ? feature : partner;
      const float own = to_float(x.values[i]), other = to_float(shared_row[partner]);
      x.values[i] = from_float<T>(rotated_first(own, other, cos_row[pair], is_first ? sin_row[pair] : -sin_row[pair]));
    }
  }
}

// Codes of the lane's features, and the scale of the row where it is per token. All threads of the warp call it.
template <class T>
__device__ __forceinline__ Features<uint8_t> quantise(const KvAppend& call, const Cache& cache, const Features<T>& x, const Place& place,
                                                      bool exists, int head, int col, int lanes) {
  const bool is_int8 = call.cache_type == ElementType::int8;
  float scale = 1.0f;
  if (call.scale_per_token) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) amax = MaxOrNan{}(amax, fabsf(to_float(x.values[i])));
    amax = reduce_lanes(amax, lanes, MaxOrNan{});
    scale = scale_of(amax, is_int8 ? kHighestInt8 : kHighestE4m3);
    if (exists && col == 0) {
      cache.scale[place.page * cache.stride_scale_page + place.offset * cache.stride_scale_token + head * cache.stride_scale_head] = scale;
    }
  } else if (exists) {
    scale = cache.scale[head * cache.stride_scale_head];
  }
  Features<uint8_t> codes;
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    const float scaled = to_float(x.values[i]) / scale;  // an IEEE division
    codes.values[i] = is_int8 ? encode_int8(scaled) : encode_e4m3(scaled);
  }
  return codes;
}

// One head of q, k or v.
struct Row {
  bool is_q, is_v;
  int head;
};

__device__ __forceinline__ Row row_of(const KvAppend& call, int index) {
  const bool is_q = index < call.q.heads, is_v = index >= call.q.heads + call.k.heads;
  return {is_q, is_v, is_q ? index : is_v ? index - call.q.heads - call.k.heads : index - call.q.heads};
}

// Block (x, y): blockDim / lanes tokens, `rows` of the heads of q, k and v, which are numbered in this order.
//
// VECTORS: memory is aligned to vectors, and what rotates is whole vectors.
template <class T, bool VECTORS, bool QUANTISED>
__global__ void __launch_bounds__(kMaxThreads) kv_append_kernel(const __grid_constant__ KvAppend call, int lanes, int rows) {
  PYT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), group = thread / lanes, col = thread % lanes * kFeatures;
  const unsigned token = blockIdx.x * (blockDim.x / lanes) + group;  // fewer than 2^31
  const bool is_token = token < call.tokens;
  const unsigned row = token / call.seqlen, column = token % call.seqlen;
  Place place{0, 0, false, 0};
  if (is_token) place = place_of(call, token, row, column);
  int64_t position = place.position;
  Angles angles;
  if (call.cos != nullptr) {
    if (call.positions != nullptr && is_token) {
      position = load_integer(call.positions, call.positions_64, row * call.stride_positions_batch + column * call.stride_positions_token);
    }
    // A dropped token may lie beyond the table; it takes the last row, and nobody reads the result.
    position = position < 0 ? 0 : position < call.length ? position : call.length - 1;
    if (VECTORS && col < call.rotary_dim) load_angles(call, angles, position, col);
  }

  const int first = static_cast<int>(blockIdx.y) * rows, all_rows = call.q.heads + 2 * call.k.heads;
  const int end = first + rows < all_rows ? first + rows : all_rows;
#pragma unroll 1
  for (int index = first; index < end; ++index) {  // the same for all threads: they meet in shuffles
    const Row at = row_of(call, index);
    const NewTokens& from = at.is_q ? call.q : at.is_v ? call.v : call.k;
    const bool exists = (at.is_q ? is_token : place.exists) && col < from.dim;
    const T* data = static_cast<const T*>(from.data) + row * from.stride_batch + column * from.stride_token + at.head * from.stride_head;
    Features<T> x = zeros<T>();
    if (exists) load_features<VECTORS>(x, data + col);
    if (!at.is_v) {
      const NormWeight& weight = at.is_q ? call.q_norm : call.k_norm;
      if (weight.data != nullptr) normalise<VECTORS>(call, weight, x, col, from.dim, lanes);
      if (call.cos != nullptr) {
        if constexpr (VECTORS) {
          rotate_vectors(call, angles, x, col);
        } else {
          rotate_any(call, x, reinterpret_cast<T*>(shared) + group * lanes * kFeatures, exists, position, col);
        }
      }
    }
    if (at.is_q) {
      T* new_q = static_cast<T*>(call.new_q) + (static_cast<int64_t>(token) * call.q.heads + at.head) * from.dim;
      if (exists) store_features<true>(new_q + col, x);
      continue;
    }
    const Cache& cache = at.is_v ? call.v_cache : call.k_cache;
    const int64_t cell = place.page * cache.stride_page + place.offset * cache.stride_token + at.head * cache.stride_head + col;
    if constexpr (QUANTISED) {
      const Features<uint8_t> codes = quantise(call, cache, x, place, exists, at.head, col, lanes);
      if (exists) store_features<VECTORS>(static_cast<uint8_t*>(cache.data) + cell, codes);
    } else {
      if (exists) store_features<VECTORS>(static_cast<T*>(cache.data) + cell, x);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------- launcher

// Whether every vector that a lane moves is aligned, and what rotates is whole vectors.
bool moves_vectors(const KvAppend& call, int64_t element_size, int64_t cache_element_size) {
  bool fits = true;
  const auto check = [&](const void* data, std::initializer_list<int64_t> strides, int64_t size, int64_t count) {
    const int64_t bytes = size * count < 16 ? size * count : 16;
    fits = fits && is_aligned(data, static_cast<size_t>(bytes));
    for (const int64_t stride : strides) fits = fits && stride * size % bytes == 0;
  };
  for (const NewTokens* x : {&call.q, &call.k, &call.v}) {
    check(x->data, {x->stride_batch, x->stride_token, x->stride_head}, element_size, kFeatures);
  }
  for (const Cache* cache : {&call.k_cache, &call.v_cache}) {
    check(cache->data, {cache->stride_page, cache->stride_token, cache->stride_head}, cache_element_size, kFeatures);
  }
  for (const NormWeight* weight : {&call.q_norm, &call.k_norm}) {
    check(weight->data, {}, weight->type == ElementType::float32 ? sizeof(float) : 2, kFeatures);
  }
  check(call.cos, {call.stride_cos}, sizeof(float), kFeatures / 2);
  check(call.sin, {call.stride_sin}, sizeof(float), kFeatures / 2);
  return fits && call.rotary_dim % (call.interleaved ? kFeatures : 2 * kFeatures) == 0;
}

template <class T, bool VECTORS>
void launch_with(const KvAppend& call, CUstream_st* stream) {
  const Shape shape = shape_of(call);
  const bool is_quantised = call.type != call.cache_type;
  const size_t shared_bytes = VECTORS || call.cos == nullptr ? 0 : shape.threads * sizeof(Features<T>);
  launch("kv_append_kernel", is_quantised ? &kv_append_kernel<T, VECTORS, true> : &kv_append_kernel<T, VECTORS, false>,
         dim3(shape.blocks_of_tokens, shape.blocks_of_rows), dim3(shape.threads), shared_bytes, stream, call, shape.lanes, shape.rows);
}

template <class T>
void launch_type(const KvAppend& call, CUstream_st* stream) {
  if (moves_vectors(call, sizeof(T), call.type == call.cache_type ? sizeof(T) : 1)) return launch_with<T, true>(call, stream);
  launch_with<T, false>(call, stream);
}

}  // namespace

void kv_append(const KvAppend& call, CUstream_st* stream) {
  if (call.type == ElementType::float32) return launch_type<float>(call, stream);
  if (call.type == ElementType::float16) return launch_type<float16>(call, stream);
  launch_type<bfloat16>(call, stream);
}

}  // namespace pytransformer
