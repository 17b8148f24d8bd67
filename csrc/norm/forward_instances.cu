// The forward kernels of one dtype. Compiled once for each of
// PYT_TYPE = float32 float16 bfloat16
#include "forward.cuh"

namespace pytransformer {

// The chunks are those of forward.cu's policy.
template <class T>
void launch_norm_forward(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  using namespace norm;
  constexpr int VEC = kVectorLength<T>;
  const bool is_walk = plan.kernel != NormForwardPlan::Kernel::rows;
  if (plan.vector_length == 1) {
    if (is_walk) return launch_walk<T, 1>(call, plan, stream);
    return plan.chunks == 4 ? launch_rows<T, 1, 4>(call, plan, stream) : launch_rows<T, 1, 16>(call, plan, stream);
  }
  if (is_walk) return launch_walk<T, VEC>(call, plan, stream);
  if (plan.chunks == 1) return launch_rows<T, VEC, 1>(call, plan, stream);
  if (plan.chunks == 16 / VEC) return launch_rows<T, VEC, 16 / VEC>(call, plan, stream);
  return launch_rows<T, VEC, 32 / VEC>(call, plan, stream);
}

template void launch_norm_forward<PYT_TYPE>(const NormForward&, const NormForwardPlan&, CUstream_st*);

}  // namespace pytransformer
