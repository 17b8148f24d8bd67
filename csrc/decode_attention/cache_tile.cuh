// Sixteen keys and values of a cache, of any layout and format, in shared memory as the tensor cores want them.
//
// A tile row is DIM elements; its 16-byte pieces are swizzled (piece ^ row % 8), so that ldmatrix meets no bank conflict. Features from
// head_dim up to DIM are zero. Codes of 8 bits are copied as they are, not swizzled, and widened to 16 bits from there.
#pragma once

#include <type_traits>

#include "extent.cuh"

namespace pytransformer::decode {

inline constexpr int kChunkKeys = 16;  // keys that a warp takes at a time: the depth of one tensor-core product

// Byte offset of a 16-byte piece in a tile of 16-bit elements.
template <int DIM>
__device__ __forceinline__ int piece_offset(int row, int piece) {
  return row * DIM * 2 + ((piece ^ (row & 7)) << 4);
}

// --- Copying --------------------------------------------------------------------------------------------------------------------------

// Up to 16 bytes of a row; zeros where they are not valid.
struct Piece {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  bool valid;
};

// For rows without alignment.
template <class Element>
__device__ __forceinline__ void copy_elements(const Piece& piece) {
  using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t, uint8_t>;
  auto* to = reinterpret_cast<Bits*>(piece.to);
  const auto* from = reinterpret_cast<const Bits*>(piece.from);
#pragma unroll 1
  for (int i = 0; i < piece.bytes / int(sizeof(Element)); ++i) to[i] = piece.valid ? from[i] : Bits{0};
}

// A warp starts copying 16 rows of `dim` elements. Lane i < 16 knows in `offset` where row i begins, negative if it is not to be read
// (then the row is zeros); `first_lane` is added to i.
template <class Element, int DIM>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const void* cache, int64_t offset, int first_lane, int dim, int vector_bytes) {
  constexpr int PIECES = DIM * int(sizeof(Element)) / 16;
  const int lane = threadIdx.x % kWarpSize;
  const auto* base = static_cast<const unsigned char*>(cache);
  const int row_bytes = dim * int(sizeof(Element));
  const auto piece_at = [&](int i) {
    const int index = i * kWarpSize + lane, row = index / PIECES, piece = index % PIECES;
    const int64_t row_offset = __shfl_sync(kFullWarp, static_cast<long long>(offset), first_lane + row);
    unsigned char* to = tile + (sizeof(Element) == 2 ? piece_offset<DIM>(row, piece) : row * DIM + piece * 16);
    const bool valid = row_offset >= 0;
    return Piece{to, valid ? base + row_offset * int64_t(sizeof(Element)) + piece * 16 : base, min(row_bytes - piece * 16, 16), valid};
  };
  constexpr int STEPS = kChunkKeys * PIECES / kWarpSize;
  if (vector_bytes == 16) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const Piece piece = piece_at(i);
      if (piece.bytes > 0) ptx::cp_async<16>(piece.to, piece.from, piece.valid);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < STEPS; ++i) {
    const Piece piece = piece_at(i);
    if (piece.bytes > 0 && vector_bytes == 8) {
      ptx::cp_async<8>(piece.to, piece.from, piece.valid);
      if (piece.bytes == 16) ptx::cp_async<8>(piece.to + 8, piece.valid ? piece.from + 8 : base, piece.valid);
    } else if (piece.bytes > 0) {
      copy_elements<Element>(piece);
    }
  }
}

// --- Widening codes -------------------------------------------------------------------------------------------------------------------

template <class T>
struct PairOf;
template <>
struct PairOf<float16> {
  using type = __half2;
};
template <>
struct PairOf<bfloat16> {
  using type = __nv_bfloat162;
};

template <class T>
__device__ __forceinline__ typename PairOf<T>::type pair_from_bits(uint32_t bits) {
  typename PairOf<T>::type pair;
  memcpy(static_cast<void*>(&pair), &bits, sizeof pair);
  return pair;
}

template <class Pair>
__device__ __forceinline__ uint32_t bits_of_pair(const Pair& pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Codes 2 PLACE and 2 PLACE + 1 of four int8 as two T, exactly.
template <class T, int PLACE>
__device__ __forceinline__ uint32_t widen_int8(uint32_t codes) {
  if constexpr (std::is_same_v<T, float16>) {
    // 0x64uu is 1024 + uu for a code shifted to 0 … 255.
    const uint32_t shifted = __byte_perm(codes ^ 0x80808080u, 0x64646464u, PLACE == 0 ? 0x4140 : 0x4342);
    return bits_of_pair(__hsub2(pair_from_bits<T>(shifted), pair_from_bits<T>(0x64806480u)));
  } else {
    // A mantissa of 7 bits holds a code without its sign: 128 + low bits, less 128 or, where the code is negative, 256.
    const uint32_t bytes = __byte_perm(codes, 0u, PLACE == 0 ? 0x4140 : 0x4342);
    const uint32_t low = (bytes & 0x007f007fu) | 0x43004300u, sign = (bytes & 0x00800080u) | 0x43004300u;
    return bits_of_pair(__hsub2(pair_from_bits<T>(low), pair_from_bits<T>(sign)));
  }
}

// Likewise four float8_e4m3fn: exponent and mantissa moved to T's places, then the exponent's bias made up for by a product with a power
// of two. Exact, subnormals too. That leaves NaN as 480, the only number that `over` takes out of T's range: 0 times that is NaN, and
// otherwise 0 of the number's sign.
template <class T, int PLACE>
__device__ __forceinline__ uint32_t widen_e4m3_by_hand(uint32_t codes) {
  constexpr bool IS_HALF = std::is_same_v<T, float16>;
  constexpr int SHIFT = IS_HALF ? 1 : 4;
  const uint32_t bytes = __byte_perm(codes, 0u, PLACE == 0 ? 0x1404 : 0x3424);
  const uint32_t moved = (bytes & 0x80008000u) | ((bytes & 0x7f007f00u) >> SHIFT);
  const uint32_t power = IS_HALF ? 0x5c005c00u /* 2^8 */ : 0x7b807b80u /* 2^120 */;
  const uint32_t over = IS_HALF ? 0x58605860u /* 140 */ : 0x7b107b10u /* 1.125 2^119 */;
  const auto number = __hmul2(pair_from_bits<T>(moved), pair_from_bits<T>(power));
  return bits_of_pair(__hfma2(__hmul2(number, pair_from_bits<T>(over)), pair_from_bits<T>(0u), number));
}

template <class T, int PLACE>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t codes) {
  const uint32_t pair = ptx::e4m3_as_float16(static_cast<uint16_t>(PLACE == 0 ? codes : codes >> 16));
  if constexpr (std::is_same_v<T, float16>) {
    return pair;
  } else {
    const float2 numbers = __half22float2(pair_from_bits<float16>(pair));
    return ptx::pack<T>(numbers.x, numbers.y);
  }
}

enum class Codes { kInt8, kE4m3, kE4m3ByHand };
inline constexpr Codes kFloat8 = ptx::kReadsE4m3 ? Codes::kE4m3 : Codes::kE4m3ByHand;

// Eight codes as eight T.
template <class T, Codes CODES>
__device__ __forceinline__ uint4 widen(uint2 codes) {
  if constexpr (CODES == Codes::kInt8) {
    return {widen_int8<T, 0>(codes.x), widen_int8<T, 1>(codes.x), widen_int8<T, 0>(codes.y), widen_int8<T, 1>(codes.y)};
  } else if constexpr (CODES == Codes::kE4m3) {
    return {widen_e4m3<T, 0>(codes.x), widen_e4m3<T, 1>(codes.x), widen_e4m3<T, 0>(codes.y), widen_e4m3<T, 1>(codes.y)};
  } else {
    return {widen_e4m3_by_hand<T, 0>(codes.x), widen_e4m3_by_hand<T, 1>(codes.x), widen_e4m3_by_hand<T, 0>(codes.y),
            widen_e4m3_by_hand<T, 1>(codes.y)};
  }
}

template <class T>
__device__ __forceinline__ uint32_t scale_pair(uint32_t bits, float scale) {
  T pair[2];
  memcpy(static_cast<void*>(pair), &bits, sizeof pair);
  return ptx::pack<T>(to_float(pair[0]) * scale, to_float(pair[1]) * scale);
}

// A warp widens 16 rows of codes to a tile of T, times a scale per row where there are some. A lane has the same piece of every row it
// meets, so that the swizzle is a constant of the step.
template <class T, int DIM, Codes CODES, bool SCALED>
__device__ __forceinline__ void widen_tile(unsigned char* tile, const unsigned char* codes, int dim, const float* row_scales) {
  constexpr int PIECES = DIM / 8;  // eight codes make 16 bytes
  constexpr int ROWS = kWarpSize / PIECES;
  const int lane = threadIdx.x % kWarpSize, first_row = lane / PIECES, piece = lane % PIECES;
  if (piece * 8 >= dim) return;
  const int start = piece_offset<DIM>(first_row, piece);
#pragma unroll
  for (int row = 0; row < kChunkKeys; row += ROWS) {
    uint2 bytes;
    memcpy(&bytes, __builtin_assume_aligned(codes + row * DIM + lane * 8, 8), sizeof bytes);
    uint4 words = widen<T, CODES>(bytes);
    if constexpr (SCALED) {
      const float scale = row_scales[row + first_row];
      words = {scale_pair<T>(words.x, scale), scale_pair<T>(words.y, scale), scale_pair<T>(words.z, scale), scale_pair<T>(words.w, scale)};
    }
    *reinterpret_cast<uint4*>(tile + row * DIM * 2 + (start ^ ((row & 7) << 4))) = words;
  }
}

template <class T, int DIM, bool SCALED = false>
__device__ __forceinline__ void widen_rows(unsigned char* tile, const unsigned char* codes, int dim, bool is_float8,
                                           const float* row_scales = nullptr) {
  if (is_float8) {
    widen_tile<T, DIM, kFloat8, SCALED>(tile, codes, dim, row_scales);
  } else {
    widen_tile<T, DIM, Codes::kInt8, SCALED>(tile, codes, dim, row_scales);
  }
}

}  // namespace pytransformer::decode
