// The compiled forward kernels, by element type and by the width that the features of keys and values are padded to.
#pragma once

#include "attention.h"

namespace pytransformer {

void attention_forward_float16_64(const AttentionForward& forward, CUstream_st* stream);
void attention_forward_float16_128(const AttentionForward& forward, CUstream_st* stream);
void attention_forward_float16_256(const AttentionForward& forward, CUstream_st* stream);
void attention_forward_bfloat16_64(const AttentionForward& forward, CUstream_st* stream);
void attention_forward_bfloat16_128(const AttentionForward& forward, CUstream_st* stream);
void attention_forward_bfloat16_256(const AttentionForward& forward, CUstream_st* stream);

}  // namespace pytransformer
