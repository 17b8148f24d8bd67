// The forward kernels for x in float32.
#include "forward.cuh"

namespace pytransformer {

template <>
void launch_norm_forward<float>(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  norm::launch_forward<float>(call, plan, stream);
}

}  // namespace pytransformer
