#include "forward.cuh"
#include "forward.h"

void pytransformer::attention_forward_bfloat16_128(const AttentionForward& forward, CUstream_st* stream) {
  attention_forward_of_width<bfloat16, 128>(forward, stream);
}
