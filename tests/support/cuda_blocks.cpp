// Prints what a block of the CUDA kernels takes whose sizes are compiled in: kernel, template arguments that decide, warps, bytes of dynamic
// shared memory. The argument is the largest dynamic shared memory of a block. Compiled for the host, against the emulator's headers.
#include <cstdio>
#include <cstdlib>

#include "attention/backward_dkv.cuh"
#include "attention/backward_dq.cuh"
#include "attention/forward.cuh"
#include "decode_attention/split.cuh"

using namespace pytransformer;

namespace {

void print(const char* kernel, const char* element, int width, int threads, int shared) {
  std::printf("%s\t%s%d\t%d\t%d\n", kernel, element, width, threads / kWarpSize, shared);
}

template <class Tiles>
int staged(const DeviceLimits& limits) {
  return Tiles::shared_bytes(choose_stages(Tiles::shared_bytes(1), Tiles::shared_bytes(2), limits));
}

template <int WIDTH>
void print_width(const DeviceLimits& limits) {
  print("attention_forward_kernel", "", WIDTH, ForwardTiles<WIDTH>::kWarps * kWarpSize, ForwardTiles<WIDTH>::kSharedBytes);
  print("attention_backward_dq_kernel", "", WIDTH, QueryTiles<WIDTH>::kThreads, staged<QueryTiles<WIDTH>>(limits));
  print("attention_backward_dkv_kernel", "", WIDTH, KeyTiles<WIDTH>::kThreads, staged<KeyTiles<WIDTH>>(limits));
  // Of up to 16 rows: one token of a group of heads.
  print("decode_kernel", "plain ", WIDTH, decode::kWarps<WIDTH> * kWarpSize, decode::Layout<bfloat16, WIDTH>::bytes(decode::kTileRows));
  print("decode_kernel", "widened ", WIDTH, decode::kWarps<WIDTH> * kWarpSize, decode::Layout<int8_t, WIDTH>::bytes(decode::kTileRows));
}

}  // namespace

int main(int, char** arguments) {
  const DeviceLimits limits{1, std::atoi(arguments[1])};
  print_width<64>(limits);
  print_width<128>(limits);
  print_width<256>(limits);
  return 0;
}
