#include "backward_dq.cuh"

template void pytransformer::attention_backward_dq_of_width<pytransformer::float16, 256>(const AttentionBackward&, CUstream_st*);
