#include "forward.cuh"

template void pytransformer::attention_forward_of_width<pytransformer::float16, 64>(const AttentionForward&, CUstream_st*);
