// The backward kernels for s in bfloat16.
#include "backward.cuh"

namespace pytransformer {

template <>
void launch_norm_backward<bfloat16>(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  norm::launch_backward<bfloat16>(call, plan, stream);
}

}  // namespace pytransformer
