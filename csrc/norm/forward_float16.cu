// The forward kernels for x in float16.
#include "forward.cuh"

namespace pytransformer {

template <>
void launch_norm_forward<float16>(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  norm::launch_forward<float16>(call, plan, stream);
}

}  // namespace pytransformer
