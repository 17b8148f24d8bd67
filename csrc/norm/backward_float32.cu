// The backward kernels for s in float32.
#include "backward.cuh"

namespace pytransformer {

template <>
void launch_norm_backward<float>(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  norm::launch_backward<float>(call, plan, stream);
}

}  // namespace pytransformer
