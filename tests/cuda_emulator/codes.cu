// Prints what each way to widen the 256 codes of an 8-bit cache makes of them, as the bits of 16-bit numbers.
#include <cstdio>

#include "../../csrc/decode_attention/cache_tile.cuh"

namespace {

using namespace pytransformer;
using decode::Codes;

template <class T, Codes CODES>
void print(const char* name) {
  std::printf("%s", name);
  for (unsigned code = 0; code < 256; code += 8) {
    unsigned char bytes[8];
    for (unsigned i = 0; i < 8; ++i) bytes[i] = static_cast<unsigned char>(code + i);
    uint2 codes;
    memcpy(&codes, bytes, sizeof codes);
    const uint4 words = decode::widen<T, CODES>(codes);
    uint16_t numbers[8];
    memcpy(numbers, &words, sizeof numbers);
    for (const uint16_t number : numbers) std::printf(" %u", number);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  print<float16, Codes::kInt8>("float16:int8:kInt8");
  print<float16, Codes::kE4m3>("float16:float8_e4m3fn:kE4m3");
  print<float16, Codes::kE4m3ByHand>("float16:float8_e4m3fn:kE4m3ByHand");
  print<bfloat16, Codes::kInt8>("bfloat16:int8:kInt8");
  print<bfloat16, Codes::kE4m3>("bfloat16:float8_e4m3fn:kE4m3");
  print<bfloat16, Codes::kE4m3ByHand>("bfloat16:float8_e4m3fn:kE4m3ByHand");
}
