// Rotary position embedding of q and k in one launch, out of place or in place; its gradient is the same with the angle reversed.
//
//     (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)                       for each pair of the first rotary_dim features
//     half layout: x1 = x[i], x2 = x[i + rotary_dim / 2];  interleaved: x1 = x[2i], x2 = x[2i + 1]
//
// Bound by memory: 3 FLOP per element; 2b bytes per element of b bytes of q and k, plus 4 rotary_dim bytes of cos and sin per token.
// Every product and sum is rounded to float32 by itself, as torch does it, and the result once to T: the same bits as the reference.
#include "../common/rope.cuh"
#include "../common/sequences.cuh"
#include "rope.h"

namespace pytransformer {
namespace {

constexpr int kMaxThreads = 256;
// Heads whose loads a thread has under way together: 16 bytes of each half of four heads are 4 KB per warp, and the 128 registers they take
// leave 16 warps on an SM: 64 KB under way, where about 40 KB cover the latency of an H200's memory.
constexpr int kHeadsAtOnce = 4;

// ------------------------------------------------------------------------------------------------------------------ launch policy

struct Shape {
  int units;             // threads side by side on one head
  int threads;           // per block
  int tokens_per_block;
  int64_t blocks;        // along the tokens
  int splits;            // blocks that share the heads of the same tokens
};

Shape shape_of(const RopeCall& call, int units) {
  const int groups = ceil_div(call.q.heads, kHeadsAtOnce) + ceil_div(call.k.heads, kHeadsAtOnce);
  int threads = kWarpSize;
  while (threads < kMaxThreads && threads < static_cast<int64_t>(call.tokens) * units) threads *= 2;
  const int tokens_per_block = units < threads ? threads / units : 1;
  const int64_t blocks = ceil_div<int64_t>(call.tokens, tokens_per_block);
  // A thread that keeps a token's cos and sin for all of its heads reads them once. Where that leaves too few blocks, four for each SM
  // (two waves of two), the heads are shared out.
  const int64_t wanted = ceil_div<int64_t>(4 * device_limits().num_sms, blocks);
  constexpr int kMaxGridY = 65535;
  const int splits = static_cast<int>(wanted < groups ? wanted : groups);
  return {units, threads, tokens_per_block, blocks, splits < kMaxGridY ? splits : kMaxGridY};
}

// ------------------------------------------------------------------------------------------------------------------------ kernel

// Row of cos and sin. A position outside of the table is an error that the host may not have seen: it must at least not read outside.
__device__ __forceinline__ int64_t table_row(const RopeCall& call, int64_t batch, int64_t index) {
  int64_t position;
  if (call.positions != nullptr) {
    position = load_integer(call.positions, call.positions_64, batch * call.stride_positions_batch + index * call.stride_positions_token);
  } else {
    int64_t sequence = batch;
    position = index + call.offset;
    if (call.cu_seqlens != nullptr) {
      sequence = find_sequence(call.cu_seqlens, call.num_sequences, index);
      const int32_t start = call.cu_seqlens[sequence];
      if (start <= index) position -= start;
    }
    if (call.offsets != nullptr) position += load_integer(call.offsets, call.offsets_64, sequence * call.stride_offsets);
  }
  return position < 0 ? 0 : position < call.length ? position : call.length - 1;
}

__device__ __forceinline__ void rotate(float& first, float& second, float cos, float sin) {
  const float x1 = first, x2 = second;
  first = rotated_first(x1, x2, cos, sin);
  second = rotated_second(x1, x2, cos, sin);
}

// Where a thread works on every head of its token: VEC features at `first` and VEC at `second`, which hold VEC whole pairs. Neighbouring
// threads have neighbouring vectors.
template <int VEC, bool INTERLEAVED>
struct Unit {
  // Of the interleaved layout each vector holds whole pairs itself, unless it is a single feature.
  static constexpr bool kPairsInside = INTERLEAVED && VEC > 1;

  int first, second;
  float cos[VEC], sin[VEC];

  __device__ __forceinline__ Unit(const RopeCall& call, int unit, int64_t row) {
    const int half = call.rotary_dim / 2;
    first = INTERLEAVED && VEC == 1 ? 2 * unit : unit * VEC;
    second = INTERLEAVED && VEC == 1 ? 2 * unit + 1 : half + unit * VEC;
    const float* cos_row = call.cos + row * call.stride_cos;
    const float* sin_row = call.sin + row * call.stride_sin;
    if constexpr (kPairsInside) {
      load_table<VEC / 2>(cos, cos_row + first / 2);
      load_table<VEC / 2>(cos + VEC / 2, cos_row + second / 2);
      load_table<VEC / 2>(sin, sin_row + first / 2);
      load_table<VEC / 2>(sin + VEC / 2, sin_row + second / 2);
    } else {
      load_table<VEC>(cos, cos_row + unit * VEC);
      load_table<VEC>(sin, sin_row + unit * VEC);
    }
    if (call.reverse) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sin[i] = -sin[i];
    }
  }

  template <class T>
  __device__ __forceinline__ void apply(Vector<T, VEC>& a, Vector<T, VEC>& b) const {
    float x1[VEC], x2[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      x1[i] = to_float(a.values[i]);
      x2[i] = to_float(b.values[i]);
    }
    if constexpr (kPairsInside) {
#pragma unroll
      for (int i = 0; i < VEC / 2; ++i) {
        rotate(x1[2 * i], x1[2 * i + 1], cos[i], sin[i]);
        rotate(x2[2 * i], x2[2 * i + 1], cos[VEC / 2 + i], sin[VEC / 2 + i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) rotate(x1[i], x2[i], cos[i], sin[i]);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      a.values[i] = from_float<T>(x1[i]);
      b.values[i] = from_float<T>(x2[i]);
    }
  }
};

// Loads the vectors of kHeadsAtOnce heads, lets `change` work on them, stores them.
template <int VEC, class T, class Change>
__device__ __forceinline__ void for_heads(const T* in, T* out, int64_t stride_in, int64_t stride_out, int heads, int first, int second,
                                          const Change& change) {
  Vector<T, VEC> a[kHeadsAtOnce], b[kHeadsAtOnce];
#pragma unroll
  for (int h = 0; h < kHeadsAtOnce; ++h) {
    if (h < heads) {
      a[h] = load_vector<VEC>(in + h * stride_in + first);
      b[h] = load_vector<VEC>(in + h * stride_in + second);
    }
  }
#pragma unroll
  for (int h = 0; h < kHeadsAtOnce; ++h) {
    if (h < heads) {
      change(a[h], b[h]);
      store_vector<VEC>(out + h * stride_out + first, a[h]);
      store_vector<VEC>(out + h * stride_out + second, b[h]);
    }
  }
}

// Block (x, y): tokens_per_block tokens, every gridDim.y-th group of kHeadsAtOnce heads of q and k.
template <class T, int VEC, bool INTERLEAVED>
__global__ void __launch_bounds__(kMaxThreads, 2) rope_kernel(const RopeCall call, int units, int tokens_per_block) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = units < static_cast<int>(blockDim.x) ? thread / units : 0;
  const unsigned token = blockIdx.x * tokens_per_block + row;  // fewer than 2^31
  if (row >= tokens_per_block || token >= call.tokens) return;
  const int64_t batch = token / call.seqlen, index = token % call.seqlen;
  const int64_t position = table_row(call, batch, index);
  const int q_groups = (call.q.heads + kHeadsAtOnce - 1) / kHeadsAtOnce, k_groups = (call.k.heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  // More than one round only for heads wider than the block.
#pragma unroll 1
  for (int u = thread - row * units; u < units; u += blockDim.x) {
    const Unit<VEC, INTERLEAVED> unit(call, u, position);
#pragma unroll 1
    for (int group = blockIdx.y; group < q_groups + k_groups; group += gridDim.y) {
      const bool is_q = group < q_groups;
      const RopeOperand& x = is_q ? call.q : call.k;
      const int head = (is_q ? group : group - q_groups) * kHeadsAtOnce;
      const T* in = static_cast<const T*>(x.in) + batch * x.stride_in_batch + index * x.stride_in_token + head * x.stride_in_head;
      T* out = static_cast<T*>(x.out) + batch * x.stride_out_batch + index * x.stride_out_token + head * x.stride_out_head;
      for_heads<VEC>(in, out, x.stride_in_head, x.stride_out_head, x.heads - head, unit.first, unit.second,
                     [&](Vector<T, VEC>& a, Vector<T, VEC>& b) { unit.apply(a, b); });
      if (!call.inplace) {  // the features that do not rotate
#pragma unroll 1
        for (int col = call.rotary_dim + u * VEC; col < call.head_dim; col += units * VEC) {
#pragma unroll
          for (int h = 0; h < kHeadsAtOnce; ++h) {
            if (h < x.heads - head) store_vector<VEC>(out + h * x.stride_out_head + col, load_vector<VEC>(in + h * x.stride_in_head + col));
          }
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------- launcher

// Whether every vector of `vec` elements that a thread moves is aligned, and those of the tables.
bool fits(const RopeCall& call, int vec, size_t element_size) {
  const int half = call.rotary_dim / 2;
  bool fits = half % vec == 0 && call.head_dim % vec == 0;
  for (const RopeOperand* x : {&call.q, &call.k}) {
    fits = fits && is_aligned(x->in, vec * element_size) && is_aligned(x->out, vec * element_size);
    for (const int64_t stride : {x->stride_in_batch, x->stride_in_token, x->stride_in_head, x->stride_out_batch, x->stride_out_token,
                                 x->stride_out_head}) {
      fits = fits && stride % vec == 0;
    }
  }
  const int floats = vec < 4 ? vec : 4;
  return fits && is_aligned(call.cos, floats * sizeof(float)) && is_aligned(call.sin, floats * sizeof(float)) &&
         call.stride_cos % floats == 0 && call.stride_sin % floats == 0;
}

template <class T, int VEC>
void launch_with(const RopeCall& call, CUstream_st* stream) {
  const Shape shape = shape_of(call, call.rotary_dim / 2 / VEC);
  const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.splits));
  launch("rope_kernel", call.interleaved ? &rope_kernel<T, VEC, true> : &rope_kernel<T, VEC, false>, grid, dim3(shape.threads), 0, stream,
         call, shape.units, shape.tokens_per_block);
}

// 16-byte vectors where everything is aligned to them, else 4 bytes (a rotary_dim of 20, say), else single elements.
template <class T>
void launch_type(const RopeCall& call, CUstream_st* stream) {
  if (fits(call, kVectorLength<T>, sizeof(T))) return launch_with<T, kVectorLength<T>>(call, stream);
  if constexpr (sizeof(T) == 2) {
    if (fits(call, 2, sizeof(T))) return launch_with<T, 2>(call, stream);
  }
  launch_with<T, 1>(call, stream);
}

}  // namespace

void rope_rotate(const RopeCall& call, CUstream_st* stream) {
  if (call.type == ElementType::float32) return launch_type<float>(call, stream);
  if (call.type == ElementType::float16) return launch_type<float16>(call, stream);
  launch_type<bfloat16>(call, stream);
}

}  // namespace pytransformer
