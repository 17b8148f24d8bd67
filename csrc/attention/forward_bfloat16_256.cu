#include "forward.cuh"
#include "forward.h"

void pytransformer::attention_forward_bfloat16_256(const AttentionForward& forward, CUstream_st* stream) {
  attention_forward_of_width<bfloat16, 256>(forward, stream);
}
