// The forward kernels for x in bfloat16.
#include "forward.cuh"

namespace pytransformer {

template <>
void launch_norm_forward<bfloat16>(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  norm::launch_forward<bfloat16>(call, plan, stream);
}

}  // namespace pytransformer
