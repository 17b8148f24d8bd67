// One dtype and one width that features are padded to. Compiled once for each combination of
// PYT_TYPE = float16 bfloat16
// PYT_WIDTH = 64 128 256
#include "backward_dkv.cuh"
#include "backward_dq.cuh"

namespace pytransformer {

template <class T, int WIDTH>
void attention_of_width(const AttentionBackward& backward, CUstream_st* stream) {
  const bool has_terms = backward.call.has_score_terms();
  if (backward.call.seqlen_q > 0) (has_terms ? launch_dq<T, WIDTH, true> : launch_dq<T, WIDTH, false>)(backward, stream);
  if (backward.call.seqlen_k > 0) (has_terms ? launch_dkv<T, WIDTH, true> : launch_dkv<T, WIDTH, false>)(backward, stream);
}

template void attention_of_width<PYT_TYPE, PYT_WIDTH>(const AttentionBackward&, CUstream_st*);

}  // namespace pytransformer
