#include "split.cuh"

namespace pytransformer::decode {

void split_float16(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  launch_split<float16, float16>(call, programs, stream);
}

}  // namespace pytransformer::decode
