// The backward pass: statistics of each query, then dQ by query tiles, then dK and dV by key tiles. Nothing is added atomically, so every run
// gives the same bits; the price is that S and dP are formed twice: 7 products of matrices, against 5 of a single kernel with atomics.
//
// delta = rowsum(dO ∘ O) - dlse; P = exp(S - lse); dS = P ∘ (dO Vᵀ - delta); dQ = scale dS K; dK = scale dSᵀ Q; dV = Pᵀ dO
// (Dao et al. 2022). P and dS are rounded to 16 bits as operands.
#include "backward_dkv.cuh"
#include "backward_dq.cuh"

namespace pytransformer {

extern template void attention_backward_dq_of_width<float16, 64>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dq_of_width<float16, 128>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dq_of_width<float16, 256>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dq_of_width<bfloat16, 64>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dq_of_width<bfloat16, 128>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dq_of_width<bfloat16, 256>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<float16, 64>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<float16, 128>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<float16, 256>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<bfloat16, 64>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<bfloat16, 128>(const AttentionBackward&, CUstream_st*);
extern template void attention_backward_dkv_of_width<bfloat16, 256>(const AttentionBackward&, CUstream_st*);

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

template <class T, int WIDTH>
void run(const AttentionBackward& backward, CUstream_st* stream) {
  if (backward.call.seqlen_q > 0) {
    launch_statistics<T>(backward, stream);
    attention_backward_dq_of_width<T, WIDTH>(backward, stream);
  }
  if (backward.call.seqlen_k > 0) attention_backward_dkv_of_width<T, WIDTH>(backward, stream);
}

template <class T>
void run(const AttentionBackward& backward, CUstream_st* stream) {
  const int32_t width = max(backward.call.head_dim, backward.call.value_dim);
  if (width <= 64) {
    run<T, 64>(backward, stream);
  } else if (width <= 128) {
    run<T, 128>(backward, stream);
  } else {
    run<T, 256>(backward, stream);
  }
}

}  // namespace

int64_t attention_backward_workspace(const AttentionCall& call) { return 2 * num_statistics(call); }

void attention_backward(const AttentionBackward& backward, CUstream_st* stream) {
  const AttentionCall& call = backward.call;
  if (call.batch == 0 || call.num_heads == 0) return;
  if (call.is_bfloat16) {
    run<bfloat16>(backward, stream);
  } else {
    run<float16>(backward, stream);
  }
}

}  // namespace pytransformer
