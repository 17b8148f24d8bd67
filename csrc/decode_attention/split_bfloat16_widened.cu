#include "split.cuh"

namespace pytransformer::decode {

// Caches of 8-bit codes.
void split_bfloat16_widened(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  launch_split<bfloat16, int8_t>(call, programs, stream);
}

}  // namespace pytransformer::decode
