// Launch policy of the forward pass, and the way to the kernels of x's dtype.
#include <algorithm>

#include "access.cuh"
#include "policy.h"

namespace pytransformer {
namespace {

using norm::allows_vectors;
using norm::kScratchBytes;
using norm::size_of;

// 16 bytes of x per access, or one element where anything is not aligned for it. Absent tensors are null, which is aligned.
int vector_length(const NormForward& call) {
  const int length = 16 / size_of(call.x_type);
  constexpr RowStrides none{0, 0};
  const bool allowed = call.cols % length == 0 && allows_vectors(call.x, call.x_type, call.x_strides, length) &&
                       allows_vectors(call.residual, call.residual_type, call.residual_strides, length) &&
                       allows_vectors(call.weight, call.weight_type, none, length) &&
                       allows_vectors(call.bias, call.bias_type, none, length) && allows_vectors(call.y, call.x_type, none, length) &&
                       allows_vectors(call.s, call.residual_type, none, length);
  return allowed ? length : 1;
}

// Columns up to which a row fits the registers of 512 threads, 32 float32 elements each; twice as many would spill, and so would 32 if
// each were an access of its own.
int64_t max_register_cols(int length) { return length > 1 ? 512 * 32 : 512 * 16; }

NormForwardPlan rows_plan(const NormForward& call, int length) {
  int64_t elements = 0;  // per thread
  if (length > 1 && call.cols <= 32 * length) {
    elements = length;  // heads: one access per thread, as many threads as a row needs
  } else if (length == 1 && call.cols <= 32 * 4) {
    elements = 4;
  } else if (length == 1 || call.cols <= 32 * 16 || (call.cols > 32 * 32 && call.cols <= 512 * 16)) {
    elements = 16;  // few registers, so that many warps hide the latency
  } else {
    elements = 32;  // one warp up to 1024 columns, no barrier; 512 threads at 16384
  }
  NormForwardPlan plan{};
  plan.kernel = NormForwardPlan::Kernel::rows;
  plan.vector_length = length;
  plan.chunks = static_cast<int>(elements / length);
  plan.threads = norm::threads_of_row(call.cols, elements);
  plan.rows_per_block = norm::rows_of_block(plan.threads);
  plan.shared_bytes = kScratchBytes;
  return plan;
}

NormForwardPlan wide_plan(const NormForward& call, int length) {
  // A part keeps each of its 512 threads busy with one round of four vectors at least.
  constexpr int64_t kVectorsPerPart = 512 * 4;
  const DeviceLimits limits = device_limits();
  const int64_t vectors = call.cols / length;
  NormForwardPlan plan{};
  plan.vector_length = length;
  plan.threads = 512;
  if (call.rows < limits.num_sms) {
    // One block per row would leave SMs idle. So few rows are still in L2 when they are read for the second time.
    const int64_t wanted = ceil_div<int64_t>(2 * limits.num_sms, call.rows);
    plan.vectors_per_split = static_cast<int>(std::max(ceil_div(vectors, wanted), std::min(vectors, kVectorsPerPart)));
    plan.splits = static_cast<int>(ceil_div<int64_t>(vectors, plan.vectors_per_split));
    if (plan.splits > 1) {
      plan.kernel = NormForwardPlan::Kernel::split;
      plan.shared_bytes = kScratchBytes;
      plan.workspace_floats = static_cast<size_t>(2 * call.rows * plan.splits);
      return plan;
    }
  }
  plan.kernel = NormForwardPlan::Kernel::wide;
  const int64_t vector_bytes = length * size_of(call.residual != nullptr ? call.residual_type : call.x_type);
  plan.staged_vectors =
      static_cast<int>(std::min(vectors, (limits.shared_memory - static_cast<int64_t>(kScratchBytes)) / vector_bytes));
  plan.shared_bytes = kScratchBytes + static_cast<size_t>(plan.staged_vectors * vector_bytes);
  return plan;
}

}  // namespace

NormForwardPlan plan_norm_forward(const NormForward& call) {
  const int length = vector_length(call);
  return call.cols <= max_register_cols(length) ? rows_plan(call, length) : wide_plan(call, length);
}

void norm_forward(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  if (call.x_type == ElementType::float32) return launch_norm_forward<float>(call, plan, stream);
  if (call.x_type == ElementType::float16) return launch_norm_forward<float16>(call, plan, stream);
  launch_norm_forward<bfloat16>(call, plan, stream);
}

}  // namespace pytransformer
