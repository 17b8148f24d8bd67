// What the attention kernels share: tiles of 16-bit features in shared memory and the fragments that mma.m16n8k16 takes out of them; where a
// block works; which keys a query sees; what a score is.
//
// The accumulator of one mma covers 16 rows and 8 columns: lane l holds, of row l / 4, columns 2 (l % 4) and the next in c[0] and c[1], and
// the same of row l / 4 + 8 in c[2] and c[3].
#pragma once

#include "../common/ptx.cuh"
#include "../common/vector.cuh"
#include "attention.h"

namespace pytransformer {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_huge_valf();

// --- Tiles in shared memory -------------------------------------------------------------------------------------------------------------
//
// Row after row of COLS elements (a multiple of 64) in 16-byte chunks. Of each 128 bytes the chunks are permuted by the row, so that the same
// columns of 8 neighbouring rows, which is what ldmatrix reads at once, lie in different banks.

inline constexpr int kChunk = 8;  // elements of 16 bytes

template <int COLS>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  static_assert(COLS % 64 == 0);
  return row * COLS + (chunk ^ (row & 7)) * kChunk;
}

// Starts copying ROWS rows, `stride` elements apart, with THREADS threads. Rows from rows_left on and columns from cols on become 0.
template <int ROWS, int COLS, int THREADS, class T>
__device__ __forceinline__ void load_tile_async(T* tile, const T* rows, int64_t stride, int rows_left, int cols) {
  constexpr int CHUNKS = COLS / kChunk, ROWS_AT_ONCE = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % ROWS_AT_ONCE == 0);
  const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
  const bool inside = chunk * kChunk < cols;
  const T* source = rows + first * stride + chunk * kChunk;
  rows_left -= first;
#pragma unroll
  for (int row = 0; row < ROWS; row += ROWS_AT_ONCE) {
    const bool valid = inside && row < rows_left;
    ptx::cp_async<16>(tile + tile_offset<COLS>(first + row, chunk), source, valid);
    source += ROWS_AT_ONCE * stride;
  }
}

// The warp's view of a tile as 16 x 16 blocks for ldmatrix. A block's four 8 x 8 matrices are numbered down first (top left, bottom left, top
// right, bottom right) or across first.
template <class T, int COLS, bool TRANSPOSED, bool DOWN_FIRST>
class BlockReader {
 public:
  __device__ __forceinline__ explicit BlockReader(const T* tile) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = DOWN_FIRST ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int half = DOWN_FIRST ? lane / 16 : lane / 8 % 2;
    base_ = tile + row * COLS;
    permutation_ = (half ^ (row & 7)) * kChunk;
  }

  // Block whose first element is (row, col); row is a multiple of 8, col of 16.
  __device__ __forceinline__ void read(uint32_t (&matrices)[4], int row, int col) const {
    ptx::ldmatrix_x4<TRANSPOSED>(matrices, base_ + row * COLS + col / 64 * 64 + (col % 64 ^ permutation_));
  }

 private:
  const T* base_;
  int permutation_;
};

// Operands of c += a b out of a tile X. For b the block serves two products: [0] and [1] are b0 and b1 of its first 8 columns (of b),
// [2] and [3] those of the other 8.
template <class T, int COLS>
using ReadA = BlockReader<T, COLS, false, true>;  // a = X
template <class T, int COLS>
using ReadTransposedA = BlockReader<T, COLS, true, false>;  // a = Xᵀ: rows of X are the depth
template <class T, int COLS>
using ReadB = BlockReader<T, COLS, true, true>;  // b = X: rows of X are the depth
template <class T, int COLS>
using ReadTransposedB = BlockReader<T, COLS, false, false>;  // b = Xᵀ: columns of X are the depth

// Two neighbouring accumulators, 16 rows x 16 columns, rounded to T: an operand a of the next product, whose depth these columns are.
template <class T>
__device__ __forceinline__ void accumulators_as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack<T>(left[0], left[1]);
  a[1] = ptx::pack<T>(left[2], left[3]);
  a[2] = ptx::pack<T>(right[0], right[1]);
  a[3] = ptx::pack<T>(right[2], right[3]);
}

// Rounds one accumulator to T and writes it into a tile; (row, col) is its first element, multiples of 8.
template <int COLS, class T>
__device__ __forceinline__ void store_accumulator(T* tile, int row, int col, const float (&c)[4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* address = tile + tile_offset<COLS>(row + lane / 4 + half * 8, col / kChunk) + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(address) = ptx::pack<T>(c[2 * half], c[2 * half + 1]);
  }
}

// Writes rows of a tile that the calling warp has filled itself (a __syncwarp after its last store_accumulator comes before) to memory:
// ROWS rows of the tile from first_row on, of which rows_left exist, `cols` of their columns.
template <int ROWS, int COLS, class T>
__device__ __forceinline__ void write_rows(T* rows, int64_t stride, int rows_left, int cols, const T* tile, int first_row) {
  constexpr int CHUNKS = COLS / kChunk, ROWS_AT_ONCE = kWarpSize / CHUNKS;
  static_assert(CHUNKS <= kWarpSize && ROWS % ROWS_AT_ONCE == 0);
  const int lane = threadIdx.x % kWarpSize, chunk = lane % CHUNKS;
  if (chunk * kChunk >= cols) return;
#pragma unroll 4
  for (int row = lane / CHUNKS; row < ROWS; row += ROWS_AT_ONCE) {
    if (row >= rows_left) return;
    const T* from = tile + tile_offset<COLS>(first_row + row, chunk);
    *reinterpret_cast<uint4*>(rows + row * stride + chunk * kChunk) = *reinterpret_cast<const uint4*>(from);
  }
}

// Maximum or sum over the four lanes that hold one row of an accumulator.
template <class Operation>
__device__ __forceinline__ float row_reduce(float value, Operation operation) {
  return warp_reduce<4>(value, operation);
}

// --- Where a block works ----------------------------------------------------------------------------------------------------------------

// Tiles of BLOCK rows times slots: a slot is a head, where sequences are not packed a head of one of them. Slots come in groups whose keys and
// values fit the L2 cache together; inside a group the slot runs fastest, so that its heads work on the same tile at the same time.
struct Schedule {
  int32_t num_tiles, num_slots, slots_per_group;

  int64_t num_blocks() const { return static_cast<int64_t>(num_tiles) * num_slots; }
};

// Tiles of `block` rows that cover packed sequences whatever their lengths, and the rows past the last one: sequence b begins at tile
// cu_seqlens[b] / block + b, which is enough for its rows and is found again by a search, with nothing read back.
inline int32_t tiles_of(const AttentionCall& call, int32_t seqlen, int32_t block) {
  return call.is_packed() ? seqlen / block + call.batch + 1 : ceil_div(seqlen, block);
}

// Schedule of tiles over `seqlen` rows of `heads` heads (of which each group of heads_per_kv shares keys and values).
inline Schedule make_schedule(const AttentionCall& call, int32_t seqlen, int32_t heads, int32_t heads_per_kv, int32_t block) {
  constexpr int64_t kL2Bytes = 32 << 20;  // of 40 MB (A100) to 60 MB (H200), part of which serves everything else
  const int64_t bytes_per_kv_head = 2 * (static_cast<int64_t>(call.seqlen_k) * (call.head_dim + call.value_dim)) + 1;
  const int64_t kv_heads = kL2Bytes / bytes_per_kv_head > 1 ? kL2Bytes / bytes_per_kv_head : 1;
  const int64_t slots = call.is_packed() ? heads : static_cast<int64_t>(call.batch) * heads;
  const int64_t per_group = kv_heads * heads_per_kv < slots ? kv_heads * heads_per_kv : slots;
  return {tiles_of(call, seqlen, block), static_cast<int32_t>(slots), static_cast<int32_t>(per_group)};
}

struct TileAndSlot {
  int32_t tile, slot;
};

// Of this block; `reversed`: the last tiles, which see most keys under a causal mask, begin first.
__device__ __forceinline__ TileAndSlot tile_and_slot(const Schedule& schedule, bool reversed) {
  const int64_t tiles = schedule.num_tiles, block = blockIdx.x;
  const int32_t first_slot = static_cast<int32_t>(block / (schedule.slots_per_group * tiles)) * schedule.slots_per_group;
  const int32_t slots_here = min(schedule.slots_per_group, schedule.num_slots - first_slot);
  const uint32_t within = static_cast<uint32_t>(block - first_slot * tiles);
  const int32_t tile = static_cast<int32_t>(within / slots_here);
  return {reversed ? schedule.num_tiles - 1 - tile : tile, first_slot + static_cast<int32_t>(within % slots_here)};
}

// One tile of rows (of queries, or of keys) of one sequence, and the rows of the other side that belong to that sequence.
struct Place {
  int32_t sequence;  // packed: `batch` for rows past the last sequence, which meet nothing
  int32_t head;
  int32_t first, length;              // the sequence's first row and its length; the first row counts packed rows, else it is 0
  int32_t other_first, other_length;  // the same of the other side
  int32_t start;                      // the tile's first row, counted from the sequence's; it may lie beyond the length: nothing to do
};

// Where a tile of BLOCK rows lies. `total` and `other_total`: rows of a sequence or, packed, of all.
template <int BLOCK>
__device__ __forceinline__ Place find_place(TileAndSlot where, int32_t batch, int32_t heads, const int32_t* cu_seqlens, int32_t total,
                                            const int32_t* other_cu_seqlens, int32_t other_total) {
  if (cu_seqlens == nullptr) {
    return {where.slot / heads, where.slot % heads, 0, total, 0, other_total, where.tile * BLOCK};
  }
  int32_t low = 0, high = batch + 1;  // the last b with cu_seqlens[b] / BLOCK + b <= tile
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (cu_seqlens[middle] / BLOCK + middle <= where.tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const bool real = low < batch;
  const int32_t first = cu_seqlens[low], other_first = other_cu_seqlens[low];
  const int32_t end = real ? cu_seqlens[low + 1] : total, other_end = real ? other_cu_seqlens[low + 1] : other_first;
  return {low, where.slot, first, min(end, total) - first, other_first, min(other_end, other_total) - other_first,
          (where.tile - (first / BLOCK + low)) * BLOCK};
}

// First element of a row (counted from the sequence's first) of a head.
template <class T>
__device__ __forceinline__ T* row_address(T* tensor, const RowStrides& strides, int32_t sequence, int32_t first, int32_t row, int32_t head) {
  return tensor + sequence * strides.batch + (static_cast<int64_t>(first) + row) * strides.row + head * strides.head;
}

// Strides of a contiguous tensor (batch, seqlen, heads, dim), packed (seqlen, heads, dim).
__device__ __forceinline__ RowStrides contiguous_strides(bool packed, int32_t seqlen, int32_t heads, int32_t dim) {
  const int64_t row = static_cast<int64_t>(heads) * dim;
  return {packed ? 0 : seqlen * row, row, dim};
}

// Index of the first query's entry in a statistic like lse: (batch, num_heads, seqlen_q), packed (num_heads, seqlen_q).
__device__ __forceinline__ int64_t statistic_index(const AttentionCall& call, int32_t sequence, int32_t first, int32_t head) {
  const int64_t slot = call.is_packed() ? head : static_cast<int64_t>(sequence) * call.num_heads + head;
  return slot * call.seqlen_q + first;
}

// --- Which keys a query sees ------------------------------------------------------------------------------------------------------------

// Tiles [begin, end) of the other side that a tile of rows meets at all, and of these [whole_begin, whole_end), which all of its rows meet
// whole and which need no mask.
struct TileRange {
  int32_t begin, whole_begin, whole_end, end;
};

// Row r, first <= r <= last, meets positions r + low_shift to r + high_shift within 0 to length - 1. No sum here leaves 32 bits: see kMaxRows.
__device__ __forceinline__ TileRange tile_range(int32_t first, int32_t last, int32_t low_shift, int32_t high_shift, int32_t length,
                                                int32_t block) {
  const auto within = [&](int32_t position) { return min(max(position, 0), length); };
  const int32_t begin = within(first + low_shift) / block;
  const int32_t end = max(begin, ceil_div(within(last + high_shift + 1), block));
  const int32_t whole_begin = min(ceil_div(within(last + low_shift), block), end);
  const int32_t whole_end = within(first + high_shift + 1) / block;
  return {begin, whole_begin, min(max(whole_end, whole_begin), end), end};
}

// Keys that a query sees, counted from some key: low <= key <= high.
struct KeyRange {
  int32_t low, high;

  __device__ __forceinline__ bool has(int32_t key) const { return key >= low && key <= high; }
};

// distance: of the query from the key that is counted from; keys_left: keys from that one to the sequence's end.
__device__ __forceinline__ KeyRange visible_keys(const AttentionCall& call, int32_t distance, int32_t keys_left) {
  return {distance - call.window_left, min(distance + call.window_right, keys_left - 1)};
}

// --- What a score is --------------------------------------------------------------------------------------------------------------------

// tanh by exp2; its absolute error of 1e-7 is far below what 16-bit inputs leave of a score.
__device__ __forceinline__ float fast_tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + ptx::exp2_approximate(x * (2.0f * kLog2E))); }

// Scores and their exponentials, of one query head. Without TERMS a score stays a plain product and the weight
// exp2(product * factor - shift), shift in base 2, costs one multiply-add and one ex2. With TERMS scores are in natural units, and the difference is
// taken first: exact where a logit is far from 0.
template <bool TERMS>
struct Scores {
  float factor;    // scale, times log2(e) without TERMS
  float softcap, inverse_softcap;
  float slope;  // of ALiBi; 0: none
  bool has_softcap;

  __device__ __forceinline__ Scores(const AttentionCall& call, int32_t sequence, int32_t head)
      : factor(TERMS ? call.softmax_scale : call.softmax_scale * kLog2E), softcap(0.0f), inverse_softcap(0.0f), slope(0.0f), has_softcap(false) {
    if constexpr (TERMS) {
      has_softcap = call.softcap > 0.0f;
      softcap = call.softcap;
      inverse_softcap = has_softcap ? 1.0f / call.softcap : 0.0f;
      if (call.alibi_slopes != nullptr) {  // rows past the last packed sequence see nothing, but must not read past the slopes
        slope = call.alibi_slopes[min(sequence, call.batch - 1) * call.stride_alibi_batch + head * call.stride_alibi_head];
      }
    }
  }

  // The scores of an array of products, before ALiBi.
  template <int M, int N>
  __device__ __forceinline__ void cap(float (&products)[M][N][4]) const {
    if constexpr (TERMS) {
      const auto each = [&](auto function) {
#pragma unroll
        for (int i = 0; i < M * N * 4; ++i) {
          float& value = products[i / (4 * N)][i / 4 % N][i % 4];
          value = function(value);
        }
      };
      each([&](float product) { return product * factor; });
      if (has_softcap) each([&](float score) { return softcap * fast_tanh(score * inverse_softcap); });
    }
  }

  // A capped score with ALiBi. distance: query + seqlen_k - seqlen_q - key.
  __device__ __forceinline__ float with_distance(float score, int32_t distance) const {
    return TERMS ? score - slope * fabsf(static_cast<float>(distance)) : score;
  }

  // A row's maximum of scores as the shift of weight().
  __device__ __forceinline__ float shift_of(float maximum) const { return TERMS ? maximum : maximum * factor; }

  // exp(score), less the shift.
  __device__ __forceinline__ float weight(float score, float shift) const {
    return ptx::exp2_approximate(TERMS ? (score - shift) * kLog2E : fmaf(score, factor, -shift));
  }

  // exp of the difference of two shifts.
  __device__ __forceinline__ float rescale(float old_shift, float new_shift) const {
    return ptx::exp2_approximate(TERMS ? (old_shift - new_shift) * kLog2E : old_shift - new_shift);
  }

  // log(sum of exp(score)) from a shift and the sum of weights, which is not 0.
  __device__ __forceinline__ float log_sum(float shift, float sum) const {
    return TERMS ? shift + log2f(sum) * kLn2 : (shift + log2f(sum)) * kLn2;
  }
};

}  // namespace pytransformer
