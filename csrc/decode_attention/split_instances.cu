// The kernels of one dtype and one kind of cache. Compiled once for each combination of
// PYT_TYPE = float16 bfloat16
// PYT_CACHE = plain widened
// Front ends of PYT_CACHE=widened: 80 89 100
#include "split.cuh"

namespace pytransformer::decode {

template <class T>
using plain = T;
template <class T>
using widened = int8_t;

template <class T, class Element>
void launch_decode(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  const int dim = call.head_dim > call.value_dim ? call.head_dim : call.value_dim;
  if (dim <= 64) {
    launch_decode<T, Element, 64>(call, programs, stream);
  } else if (dim <= 128) {
    launch_decode<T, Element, 128>(call, programs, stream);
  } else {
    launch_decode<T, Element, 256>(call, programs, stream);
  }
}

template void launch_decode<PYT_TYPE, PYT_CACHE<PYT_TYPE>>(const DecodeAttention&, const DecodeClass&, CUstream_st*);

}  // namespace pytransformer::decode
