// Picks the compiled kernel of a call.
#include "forward.cuh"

namespace pytransformer {

extern template void attention_forward_of_width<float16, 64>(const AttentionForward&, CUstream_st*);
extern template void attention_forward_of_width<float16, 128>(const AttentionForward&, CUstream_st*);
extern template void attention_forward_of_width<float16, 256>(const AttentionForward&, CUstream_st*);
extern template void attention_forward_of_width<bfloat16, 64>(const AttentionForward&, CUstream_st*);
extern template void attention_forward_of_width<bfloat16, 128>(const AttentionForward&, CUstream_st*);
extern template void attention_forward_of_width<bfloat16, 256>(const AttentionForward&, CUstream_st*);

namespace {

template <class T>
void attention_forward_of_type(const AttentionForward& forward, CUstream_st* stream) {
  const int32_t width = forward.call.head_dim > forward.call.value_dim ? forward.call.head_dim : forward.call.value_dim;
  if (width <= 64) {
    attention_forward_of_width<T, 64>(forward, stream);
  } else if (width <= 128) {
    attention_forward_of_width<T, 128>(forward, stream);
  } else {
    attention_forward_of_width<T, 256>(forward, stream);
  }
}

}  // namespace

void attention_forward(const AttentionForward& forward, CUstream_st* stream) {
  if (forward.call.is_bfloat16) {
    attention_forward_of_type<bfloat16>(forward, stream);
  } else {
    attention_forward_of_type<float16>(forward, stream);
  }
}

}  // namespace pytransformer
