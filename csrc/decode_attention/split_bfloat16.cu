#include "split.cuh"

namespace pytransformer::decode {

void split_bfloat16(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  launch_split<bfloat16, bfloat16>(call, programs, stream);
}

}  // namespace pytransformer::decode
