// The backward kernels of one dtype. Compiled once for each of
// PYT_TYPE = float32 float16 bfloat16
#include "backward.cuh"

namespace pytransformer {

// The chunks are those of backward.cu's policy.
template <class T>
void launch_norm_backward(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  using namespace norm;
  constexpr int VEC = kVectorLength<T>;
  if (plan.vector_length == 1) {
    return plan.whole_rows ? launch_backward_rows<T, 1, 8>(call, plan, stream) : launch_backward_columns<T, 1>(call, plan, stream);
  }
  if (!plan.whole_rows) return launch_backward_columns<T, VEC>(call, plan, stream);
  return plan.chunks == 1 ? launch_backward_rows<T, VEC, 1>(call, plan, stream) : launch_backward_rows<T, VEC, 16 / VEC>(call, plan, stream);
}

template void launch_norm_backward<PYT_TYPE>(const NormBackward&, const NormBackwardPlan&, CUstream_st*);

}  // namespace pytransformer
