// One dtype and one width that features are padded to. Compiled once for each combination of
// PYT_TYPE = float16 bfloat16
// PYT_WIDTH = 64 128 256
#include "forward.cuh"

namespace pytransformer {

template <class T, int WIDTH>
void attention_of_width(const AttentionForward& forward, CUstream_st* stream) {
  (forward.call.has_score_terms() ? launch_attention_forward<T, WIDTH, true> : launch_attention_forward<T, WIDTH, false>)(forward, stream);
}

template void attention_of_width<PYT_TYPE, PYT_WIDTH>(const AttentionForward&, CUstream_st*);

}  // namespace pytransformer
