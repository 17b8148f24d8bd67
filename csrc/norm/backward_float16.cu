// The backward kernels for s in float16.
#include "backward.cuh"

namespace pytransformer {

template <>
void launch_norm_backward<float16>(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  norm::launch_backward<float16>(call, plan, stream);
}

}  // namespace pytransformer
