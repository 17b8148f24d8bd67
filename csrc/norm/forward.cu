#include "../common/vector.cuh"
#include "norm.h"

namespace pytransformer {
namespace {

template <class T>
__global__ void rms_row_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y, int64_t cols, float eps) {
  constexpr int WARPS = 4;
  __shared__ float scratch[WARPS];
  const T* row = x + blockIdx.x * cols;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) sum += to_float(row[c]) * to_float(row[c]);
  const float rstd = rsqrtf(block_sum<WARPS>(sum, scratch) / cols + eps);
  for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) y[blockIdx.x * cols + c] = from_float<T>(to_float(row[c]) * rstd * (weight ? to_float(weight[c]) : 1.0f));
}

}  // namespace

void norm_forward(const NormForward& call, CUstream_st* stream) {
  launch("rms_row_kernel", &rms_row_kernel<bfloat16>, dim3(call.rows), dim3(128), 0, stream, static_cast<const bfloat16*>(call.x),
         static_cast<const bfloat16*>(call.weight), static_cast<bfloat16*>(call.y), call.cols, call.eps);
}

}  // namespace pytransformer
