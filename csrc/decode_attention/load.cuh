// A block's shared memory, and how queries, keys and values come there.
#pragma once

#include "cache_tile.cuh"
#include "schedule.cuh"

namespace pytransformer::decode {

inline constexpr int kStages = 2;
inline constexpr int kTileRows = 16;  // of a tensor-core product

// Features are padded to 64, 128 or 256. At 256 the output of a row tile takes 128 registers, and a stage of two warps as much shared
// memory as one of four warps at 128.
template <int DIM>
inline constexpr int kWarps = DIM == 256 ? 2 : 4;

// Shared memory of a block, in bytes from its start.
template <class Element, int DIM>
struct Layout {
  static constexpr int WARPS = kWarps<DIM>;
  static constexpr bool WIDENED = sizeof(Element) == 1;
  static constexpr int KEYS = kChunkKeys * DIM * int(sizeof(Element));      // 16 keys, or 16 values
  static constexpr int SCALES = WIDENED ? 2 * kChunkKeys * 4 : 0;           // of keys, then of values
  static constexpr int STAGE = 2 * KEYS + SCALES;                           // of one warp
  static constexpr int TILE = 2 * kChunkKeys * DIM * 2;                     // 16 keys and values widened, of one warp
  static constexpr int TILES = kStages * WARPS * STAGE;                     // where those begin
  static constexpr int BUFFERS = TILES + (WIDENED ? WARPS * TILE : 0);      // end of what the loop uses
  static constexpr int OUT_ROW = DIM + 8;                                   // floats; padded against bank conflicts
  static constexpr int STATS = WARPS * kTileRows * OUT_ROW * 4;             // the outputs of the warps, once the loop is through
  static constexpr int EPILOGUE = STATS + WARPS * kTileRows * 8;
  static constexpr int Q = BUFFERS > EPILOGUE ? BUFFERS : EPILOGUE;         // q comes last, as its size varies
  static constexpr int work(int block_rows) { return Q + block_rows * DIM * 2; }  // where the block keeps what it works on
  static constexpr int bytes(int block_rows) { return work(block_rows) + int(sizeof(Work)); }
};

// Where the keys of one sequence and key head lie.
struct CachePlace {
  const void *k, *v;
  const float *k_scale, *v_scale;
  const int32_t* table_row;
  int cache_row;
};

template <class Element>
__device__ __forceinline__ CachePlace cache_place(const DecodeAttention& call, const Program& program) {
  CachePlace place{};
  place.k = static_cast<const Element*>(call.k) + program.kv_head * call.stride_k_head;
  place.v = static_cast<const Element*>(call.v) + program.kv_head * call.stride_v_head;
  if (call.k_scale != nullptr) {
    place.k_scale = call.k_scale + program.kv_head * call.stride_k_scale_head;
    place.v_scale = call.v_scale + program.kv_head * call.stride_v_scale_head;
  }
  if (call.block_table != nullptr) place.table_row = call.block_table + program.sequence * call.stride_block_table;
  place.cache_row = call.cache_batch_idx != nullptr ? call.cache_batch_idx[program.sequence] : program.sequence;
  return place;
}

// The page of a key, or -1 for one that is not to be read.
__device__ __forceinline__ int page_of(const DecodeAttention& call, const CachePlace& place, int slot, bool wanted) {
  if (!wanted) return -1;
  return place.table_row != nullptr ? place.table_row[slot / call.page_size] : place.cache_row;
}

// Starts the copies of a warp's next 16 keys and values. Lane i and lane i + 16 know the page and slot of key i.
template <class Element, int DIM>
__device__ __forceinline__ void copy_chunk(const DecodeAttention& call, const CachePlace& place, unsigned char* stage, int page, int slot) {
  using Smem = Layout<Element, DIM>;
  const int lane = threadIdx.x % kWarpSize;
  const bool is_value = lane >= kChunkKeys, valid = page >= 0;
  const int64_t offset_in_page = call.page_size > 0 ? slot % call.page_size : slot;
  const int64_t offset = is_value ? page * call.stride_v_page + offset_in_page * call.stride_v_token
                                  : page * call.stride_k_page + offset_in_page * call.stride_k_token;
  copy_rows<Element, DIM>(stage, place.k, valid ? offset : -1, 0, call.head_dim, call.k_vector_bytes);
  copy_rows<Element, DIM>(stage + Smem::KEYS, place.v, valid ? offset : -1, kChunkKeys, call.value_dim, call.v_vector_bytes);
  if constexpr (Smem::WIDENED) {
    if (call.scale_per_token) {
      const float* scale = is_value ? place.v_scale : place.k_scale;
      const int64_t scale_offset = is_value ? page * call.stride_v_scale_page + offset_in_page * call.stride_v_scale_token
                                            : page * call.stride_k_scale_page + offset_in_page * call.stride_k_scale_token;
      ptx::cp_async<4>(stage + 2 * Smem::KEYS + lane * 4, valid ? scale + scale_offset : scale, valid);
    }
  }
}

// Fills q's rows of the block: tile rows in order, zeros where there is no row or no feature.
template <class T, int DIM>
__device__ __forceinline__ void load_queries(const DecodeAttention& call, const Program& program, const Sequence& sequence, int first_row,
                                             int block_rows, unsigned char* tile) {
  constexpr int PIECES = DIM / 8;
  const int num_rows = sequence.seqlen_q * call.group;
  for (int index = threadIdx.x; index < block_rows * PIECES; index += blockDim.x) {
    const int row = index / PIECES, piece = index % PIECES;
    uint4 words{0, 0, 0, 0};
    if (first_row + row < num_rows && piece * 8 < call.head_dim) {
      const RowPlace place = place_of(call, program.kv_head, first_row + row);
      const T* from = static_cast<const T*>(call.q) + program.sequence * call.stride_q_batch +
                      int64_t(sequence.first_token + place.token) * call.stride_q_token + place.head * call.stride_q_head + piece * 8;
      if (call.q_vector_bytes == 16) {
        words = *reinterpret_cast<const uint4*>(from);
      } else {
        T elements[8];
        for (int i = 0; i < 8; ++i) elements[i] = from[i];
        memcpy(&words, elements, sizeof words);
      }
    }
    *reinterpret_cast<uint4*>(tile + piece_offset<DIM>(row, piece)) = words;
  }
}

// Zeros the features that copies never write, of `tiles` tiles of 16 keys and 16 values that lie `stride` bytes apart.
template <int DIM>
__device__ __forceinline__ void clear_padding(const DecodeAttention& call, unsigned char* first_tile, int tiles, int stride) {
  constexpr int PIECES = DIM / 8;
  if (call.head_dim == DIM && call.value_dim == DIM) return;
  for (int index = threadIdx.x; index < tiles * 2 * kChunkKeys * PIECES; index += blockDim.x) {
    const int row = index / PIECES % (2 * kChunkKeys), piece = index % PIECES;
    if (piece * 8 < (row < kChunkKeys ? call.head_dim : call.value_dim)) continue;
    unsigned char* tile = first_tile + index / (PIECES * 2 * kChunkKeys) * stride;
    *reinterpret_cast<uint4*>(tile + piece_offset<DIM>(row, piece)) = uint4{0, 0, 0, 0};
  }
}

}  // namespace pytransformer::decode
