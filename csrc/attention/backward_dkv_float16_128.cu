#include "backward_dkv.cuh"

template void pytransformer::attention_backward_dkv_of_width<pytransformer::float16, 128>(const AttentionBackward&, CUstream_st*);
