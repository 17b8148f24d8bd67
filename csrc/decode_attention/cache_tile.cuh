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

// Likewise four float8_e4m3fn other than NaN: exponent and mantissa moved to T's places, then the exponent's bias made up for by a
// product with a power of two. Exact, subnormals too.
template <class T, int PLACE>
__device__ __forceinline__ uint32_t widen_float8(uint32_t codes) {
  constexpr int SHIFT = std::is_same_v<T, float16> ? 1 : 4;
  const uint32_t bytes = __byte_perm(codes, 0u, PLACE == 0 ? 0x1404 : 0x3424);
  const uint32_t moved = (bytes & 0x80008000u) | ((bytes & 0x7f007f00u) >> SHIFT);
  const uint32_t power = std::is_same_v<T, float16> ? 0x5c005c00u /* 2^8 */ : 0x7b807b80u /* 2^120 */;
  return bits_of_pair(__hmul2(pair_from_bits<T>(moved), pair_from_bits<T>(power)));
}

// The high bit of each byte that is NaN in float8_e4m3fn.
__device__ __forceinline__ uint32_t float8_nans(uint32_t codes) { return ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }

template <class T>
__device__ __forceinline__ void widen_four(uint32_t (&words)[2], uint32_t codes, bool is_float8) {
  if (!is_float8) {
    words[0] = widen_int8<T, 0>(codes);
    words[1] = widen_int8<T, 1>(codes);
    return;
  }
  words[0] = widen_float8<T, 0>(codes);
  words[1] = widen_float8<T, 1>(codes);
  const uint32_t nans = float8_nans(codes);
  if (nans != 0) {  // all ones is NaN in T
    words[0] |= ((nans & 0x80u) ? 0x0000ffffu : 0u) | ((nans & 0x8000u) ? 0xffff0000u : 0u);
    words[1] |= ((nans & 0x800000u) ? 0x0000ffffu : 0u) | ((nans & 0x80000000u) ? 0xffff0000u : 0u);
  }
}

template <class T>
__device__ __forceinline__ uint32_t scale_pair(uint32_t bits, float scale) {
  T pair[2];
  memcpy(static_cast<void*>(pair), &bits, sizeof pair);
  return ptx::pack<T>(to_float(pair[0]) * scale, to_float(pair[1]) * scale);
}

// A warp widens 16 rows of codes to a tile of T, times a scale per row where there are some.
template <class T, int DIM>
__device__ __forceinline__ void widen_rows(unsigned char* tile, const unsigned char* codes, int dim, bool is_float8, const float* row_scales) {
  constexpr int PIECES = DIM / 8;  // eight codes make 16 bytes
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 4
  for (int i = 0; i < kChunkKeys * PIECES / kWarpSize; ++i) {
    const int index = i * kWarpSize + lane, row = index / PIECES, piece = index % PIECES;
    if (piece * 8 >= dim) continue;
    uint2 bytes;
    memcpy(&bytes, __builtin_assume_aligned(codes + row * DIM + piece * 8, 8), sizeof bytes);
    uint32_t low[2], high[2];
    widen_four<T>(low, bytes.x, is_float8);
    widen_four<T>(high, bytes.y, is_float8);
    uint4 words{low[0], low[1], high[0], high[1]};
    if (row_scales != nullptr) {
      const float scale = row_scales[row];
      words = {scale_pair<T>(words.x, scale), scale_pair<T>(words.y, scale), scale_pair<T>(words.z, scale), scale_pair<T>(words.w, scale)};
    }
    *reinterpret_cast<uint4*>(tile + piece_offset<DIM>(row, piece)) = words;
  }
}

}  // namespace pytransformer::decode
