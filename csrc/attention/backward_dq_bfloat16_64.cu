#include "backward_dq.cuh"

template void pytransformer::attention_backward_dq_of_width<pytransformer::bfloat16, 64>(const AttentionBackward&, CUstream_st*);
