#include "forward.h"

#include <algorithm>

namespace pytransformer {

void attention_forward(const AttentionForward& forward, CUstream_st* stream) {
  const bool bf16 = forward.call.is_bfloat16;
  const int32_t features = std::max(forward.call.head_dim, forward.call.value_dim);
  const auto kernel = features <= 64    ? (bf16 ? attention_forward_bfloat16_64 : attention_forward_float16_64)
                      : features <= 128 ? (bf16 ? attention_forward_bfloat16_128 : attention_forward_float16_128)
                                        : (bf16 ? attention_forward_bfloat16_256 : attention_forward_float16_256);
  kernel(forward, stream);
}

}  // namespace pytransformer
