#include "forward.cuh"

template void pytransformer::attention_forward_of_width<pytransformer::bfloat16, 64>(const AttentionForward&, CUstream_st*);
