#include "forward.cuh"
#include "forward.h"

void pytransformer::attention_forward_float16_64(const AttentionForward& forward, CUstream_st* stream) {
  attention_forward_of_width<float16, 64>(forward, stream);
}
