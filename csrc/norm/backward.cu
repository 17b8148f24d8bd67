// Launch policy of the backward pass, the way to the kernels of s's dtype, and the sum of the partial rows.
#include "backward.cuh"
#include "policy.h"

namespace pytransformer {
namespace {

using namespace norm;

// Elements of g, xhat, dweight and dbias that a thread holds; twice as many would spill. So would 16 if each were an access of its own.
int64_t max_elements(int length) { return length > 1 ? 16 : 8; }

// 16 bytes of s per access, or one element where anything is not aligned for it.
int vector_length(const NormBackward& call) {
  const int length = 16 / size_of(call.s_type);
  const bool allowed = call.cols % length == 0 && allows_vectors(call.s, call.s_type, call.s_strides, length) &&
                       allows_vectors(call.dy, call.dy_type, call.dy_strides, length) &&
                       allows_vectors(call.ds, call.s_type, call.ds_strides, length) &&
                       allows_vectors(call.weight, call.weight_type, {0, 0}, length) &&
                       allows_vectors(call.dx, call.s_type, {0, 0}, length);
  return allowed ? length : 1;
}

// False if the rows do not fit a block.
bool plan_whole_rows(const NormBackward& call, const DeviceLimits& limits, NormBackwardPlan& plan) {
  const int length = plan.vector_length;
  if (call.cols > kMaxRowThreads * max_elements(length)) return false;
  plan.whole_rows = true;
  plan.chunks = length > 1 && call.cols <= kWarpSize * length ? 1 : static_cast<int>(max_elements(length)) / length;
  plan.threads = threads_of_row(call.cols, static_cast<int64_t>(plan.chunks) * length);
  plan.rows_per_block = rows_of_block(plan.threads);
  const int64_t elements_of_row = static_cast<int64_t>(plan.threads) * plan.chunks * length, elements = elements_of_row * plan.rows_per_block;
  plan.shared_bytes = backward_shared(call, elements_of_row, elements, length > 1).bytes;
  if (plan.rows_per_block > 1) {
    // The rows of a block are added up there.
    plan.shared_bytes = std::max(plan.shared_bytes, kScratchBytes + static_cast<size_t>(elements) * sizeof(float));
  }
  if (plan.shared_bytes > static_cast<size_t>(limits.shared_memory)) return false;
  // As many blocks as run at once: each more would write partial rows, and a second wave of them would be a short one. 512 threads that
  // have their next row in flight keep an SM's share of the memory busy; heads' rows are short, and take twice as many.
  const int block = plan.threads * plan.rows_per_block, wanted = std::max(1, (plan.chunks == 1 ? 1024 : 512) / block);
  const int fitting = std::max(1, static_cast<int>(static_cast<size_t>(limits.shared_memory) / plan.shared_bytes));
  const int64_t tiles = ceil_div<int64_t>(call.rows, plan.rows_per_block);
  plan.programs = static_cast<int>(std::min<int64_t>(tiles, static_cast<int64_t>(limits.num_sms) * std::min(wanted, fitting)));
  return true;
}

void plan_columns(const NormBackward& call, const DeviceLimits& limits, NormBackwardPlan& plan) {
  // A part keeps each of its 256 threads busy with one round of four vectors at least.
  constexpr int64_t kVectorsPerPart = kColumnThreads * 4;
  const int64_t vectors = call.cols / plan.vector_length, wanted = ceil_div<int64_t>(2 * limits.num_sms, call.rows);
  plan.whole_rows = false;
  plan.threads = kColumnThreads;
  plan.shared_bytes = kScratchBytes;
  plan.vectors_per_split = static_cast<int>(std::max(ceil_div(vectors, wanted), std::min(vectors, kVectorsPerPart)));
  plan.splits = static_cast<int>(ceil_div<int64_t>(vectors, plan.vectors_per_split));
  // Two blocks of columns per SM.
  const int64_t column_blocks = ceil_div<int64_t>(vectors, kColumnThreads);
  plan.programs = static_cast<int>(std::min(call.rows, std::max<int64_t>(1, 2 * limits.num_sms / column_blocks)));
}

template <class T>
__device__ __forceinline__ void store_as(void* to, int64_t index, float value) {
  static_cast<T*>(to)[index] = from_float<T>(value);
}

// Sums of the partial rows, always in the same order; blockIdx.y = 0: dweight, 1: dbias.
__global__ void __launch_bounds__(kReduceCols* kReduceSlices)
    norm_reduce_partials_kernel(const NormBackward call, int num_partials, size_t dbias_partials) {
  PYT_DYNAMIC_SHARED(shared);
  auto* slices = reinterpret_cast<float(*)[kReduceCols]>(shared);
  const bool is_bias = blockIdx.y == 1;
  void* result = is_bias ? call.dbias : call.dweight;
  if (result == nullptr) return;
  const float* partials = call.workspace + (is_bias ? dbias_partials : 0);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kReduceCols + threadIdx.x;
  float sum = 0.0f;
  if (col < call.cols) {
#pragma unroll 4
    for (int row = threadIdx.y; row < num_partials; row += kReduceSlices) sum += partials[row * call.cols + col];
  }
  slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= call.cols) return;
  sum = slices[0][threadIdx.x];
#pragma unroll
  for (int slice = 1; slice < kReduceSlices; ++slice) sum += slices[slice][threadIdx.x];
  with_type(is_bias ? call.dbias_type : call.weight_type, [&](auto tag) { store_as<typename decltype(tag)::Element>(result, col, sum); });
}

}  // namespace

NormBackwardPlan plan_norm_backward(const NormBackward& call) {
  const DeviceLimits limits = device_limits();
  NormBackwardPlan plan{};
  plan.vector_length = vector_length(call);
  if (!plan_whole_rows(call, limits, plan)) plan_columns(call, limits, plan);
  // Partial rows begin where accesses of 16 bytes are allowed.
  plan.partial_floats = static_cast<size_t>(ceil_div<int64_t>(plan.programs * call.cols, 4) * 4);
  plan.workspace_floats = 2 * plan.partial_floats + static_cast<size_t>(plan.whole_rows ? 0 : 2 * call.rows * plan.splits);
  return plan;
}

void norm_backward(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  if (call.s_type == ElementType::float32) {
    launch_norm_backward<float>(call, plan, stream);
  } else if (call.s_type == ElementType::float16) {
    launch_norm_backward<float16>(call, plan, stream);
  } else {
    launch_norm_backward<bfloat16>(call, plan, stream);
  }
  if (call.dweight == nullptr && call.dbias == nullptr) return;
  launch("norm_reduce_partials_kernel", &norm_reduce_partials_kernel,
         dim3(static_cast<unsigned>(ceil_div<int64_t>(call.cols, kReduceCols)), 2), dim3(kReduceCols, kReduceSlices),
         kReduceCols * kReduceSlices * sizeof(float), stream, call, plan.programs, plan.partial_floats);
}

}  // namespace pytransformer
