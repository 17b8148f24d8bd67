// The way to the kernels of a call's type and width, and what the backward pass starts with.
//
// The backward pass: statistics of each query, then dQ by query tiles, then dK and dV by key tiles. Nothing is added atomically, so every run
// gives the same bits; the price is that S and dP are formed twice: 7 products of matrices, against 5 of a single kernel with atomics.
//
// delta = rowsum(dO ∘ O) - dlse; P = exp(S - lse); dS = P ∘ (dO Vᵀ - delta); dQ = scale dS K; dK = scale dSᵀ Q; dV = Pᵀ dO
// (Dao et al. 2022). P and dS are rounded to 16 bits as operands.
#include "backward_tile.cuh"

namespace pytransformer {

// Calls of type T whose features, of keys and of values, are at most WIDTH; each is compiled on its own (*_instances.cu).
template <class T, int WIDTH>
void attention_of_width(const AttentionForward& forward, CUstream_st* stream);
template <class T, int WIDTH>
void attention_of_width(const AttentionBackward& backward, CUstream_st* stream);

namespace {

constexpr int kRowsPerBlock = 16;  // a warp sums one row at a time: 32 lanes of 8 features are the largest head

// shift (what is subtracted from a score) and delta of each query and head. A row that saw nothing gets weights of 0 from a shift of inf,
// and no gradient, whatever flows into its lse: a merge of two partial results may well send NaN.
template <class T>
__global__ void __launch_bounds__(128) attention_backward_statistics_kernel(const AttentionBackward backward, bool in_base_2) {
  const AttentionCall& call = backward.call;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t tiles = ceil_div(call.seqlen_q, kRowsPerBlock);
  const int32_t slot = static_cast<int32_t>(blockIdx.x / tiles), sequence = slot / call.num_heads, head = slot % call.num_heads;
  const int32_t start = static_cast<int32_t>(blockIdx.x % tiles) * kRowsPerBlock;
  const RowStrides strides_out = contiguous_strides(call.is_packed(), call.seqlen_q, call.num_heads, call.value_dim);
  for (int32_t row = start + warp; row < min(start + kRowsPerBlock, call.seqlen_q); row += 128 / kWarpSize) {
    float sum = 0.0f;
    if (lane * kChunk < call.value_dim) {
      float out[kChunk], dout[kChunk];
      load_floats(out, row_address(static_cast<const T*>(backward.out), strides_out, sequence, 0, row, head) + lane * kChunk);
      load_floats(dout, row_address(static_cast<const T*>(backward.dout), backward.stride_dout, sequence, 0, row, head) + lane * kChunk);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += out[i] * dout[i];
    }
    sum = warp_reduce<kWarpSize>(sum, Sum{});
    if (lane == 0) {
      const int64_t index = statistic_index(call, sequence, row, head);
      const float lse = backward.lse[index];
      const bool sees_nothing = lse == -kInfinity;
      backward.workspace[index] = sees_nothing ? kInfinity : in_base_2 ? lse * kLog2E : lse;
      backward.workspace[num_statistics(call) + index] =
          sees_nothing ? 0.0f : sum - (backward.dlse != nullptr ? backward.dlse[index] : 0.0f);
    }
  }
}

template <class T>
void launch_statistics(const AttentionBackward& backward, CUstream_st* stream) {
  const AttentionCall& call = backward.call;
  const int64_t slots = call.is_packed() ? call.num_heads : static_cast<int64_t>(call.batch) * call.num_heads;
  launch("attention_backward_statistics_kernel", &attention_backward_statistics_kernel<T>,
         dim3(static_cast<unsigned>(slots * ceil_div(call.seqlen_q, kRowsPerBlock))), dim3(128), 0, stream, backward,
         !call.has_score_terms());
}

// Pass: forward or backward.
template <class T, class Pass>
void run(const Pass& pass, CUstream_st* stream) {
  const int32_t width = max(pass.call.head_dim, pass.call.value_dim);
  if (width <= 64) return attention_of_width<T, 64>(pass, stream);
  if (width <= 128) return attention_of_width<T, 128>(pass, stream);
  attention_of_width<T, 256>(pass, stream);
}

template <class Pass>
void run(const Pass& pass, CUstream_st* stream) {
  if (pass.call.type == ElementType::float16) return run<float16>(pass, stream);
  run<bfloat16>(pass, stream);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionCall& call) { return 2 * num_statistics(call); }

void attention_forward(const AttentionForward& forward, CUstream_st* stream) { run(forward, stream); }

void attention_backward(const AttentionBackward& backward, CUstream_st* stream) {
  const AttentionCall& call = backward.call;
  if (call.batch == 0 || call.num_heads == 0) return;
  if (call.seqlen_q > 0) (call.type == ElementType::float16 ? launch_statistics<float16> : launch_statistics<bfloat16>)(backward, stream);
  run(backward, stream);
}

}  // namespace pytransformer
