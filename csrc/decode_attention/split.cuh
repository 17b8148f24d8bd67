// The kernel of decode attention: splits of a sequence's keys for a tile of its query rows, and their merge by the last block that arrives.
//
// A row is (query token, head of the group that shares a key head), so that a key is read once for all of them. Each warp takes 16 keys
// at a time, from its own double buffer, which it fills itself. With up to 16 rows the warps of a block take different keys, never wait
// for each other, and are merged at the end, in order of their numbers; with more rows each warp has 16 rows of its own and meets all keys
// of the block. Which keys a warp takes depends on their positions only.
//
// A block that computes all splits of a tile folds them as it goes. Where several blocks share a tile, each leaves its splits' unnormalised
// outputs, maxima and sums, and the one that counts the last split folds all of them, in ascending order: the same bits either way, and
// nobody waits for anybody.
//
// Cost: every visible key and value is read once per tile of rows: (head_dim + value_dim) · itemsize bytes per key and key head.
#pragma once

#include "load.cuh"

namespace pytransformer::decode {

// What one lane knows of its two rows of the scores, lane / 4 and that + 8: the keys they see.
struct LaneRows {
  int row[2];
  int low[2], high[2];
};

// A lane's scores of a chunk: key 8 t + 2 (lane % 4) + c of row r is score[t][2 r + c].
using Scores = float[2][4];

// Whether the scale of a token's value goes to the value, and not to its weight, eight numbers of a lane instead of DIM / 2: a weight in
// float16 would be out of range with some scales.
template <class T>
inline constexpr bool kScalesValues = std::is_same_v<T, float16>;

// Everything beyond scaling: softcap, bias, ALiBi, mask.
__device__ __forceinline__ void add_score_terms(const DecodeAttention& call, const Program& program, const Sequence& sequence,
                                                const LaneRows& rows, int first_key, Scores& scores) {
  const int position_offset = sequence.seqlen_k - sequence.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowPlace place = place_of(call, program.kv_head, rows.row[r]);
    float slope = 0.0f;
    if (call.alibi_slopes != nullptr && rows.high[r] > rows.low[r]) {
      slope = load_as_float(call.alibi_slopes, call.alibi_type, program.sequence * call.stride_alibi_batch + place.head);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = i / 2, c = i % 2;
      const int key = first_key + 8 * t + 2 * (threadIdx.x % 4) + c;
      float score = scores[t][2 * r + c];
      if (call.softcap > 0.0f) score = call.softcap * tanhf(score / call.softcap);
      const bool sees = key >= rows.low[r] && key < rows.high[r];
      if (call.bias != nullptr && sees) {
        score += place.token < call.bias_rows
                     ? load_as_float(call.bias, call.bias_type,
                                     program.sequence * call.stride_bias_batch + place.head * call.stride_bias_head +
                                         place.token * call.stride_bias_token + key * call.stride_bias_key)
                     : -kInfinity;
      }
      score -= slope * static_cast<float>(abs(position_offset + place.token - key));
      if (call.mask != nullptr && sees) {
        const bool attend = place.token < call.mask_rows &&
                            call.mask[program.sequence * call.stride_mask_batch + place.head * call.stride_mask_head +
                                      place.token * call.stride_mask_token + key * call.stride_mask_key] != 0;
        if (!attend) score = -kInfinity;
      }
      scores[t][2 * r + c] = score;
    }
  }
}

// The softmax and the output of a warp's 16 rows so far.
template <int DIM>
struct Accumulator {
  float out[DIM / 8][4];
  float max[2], sum[2];  // sum: this lane's share

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < DIM / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }
    max[0] = max[1] = -kInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  // Takes scores in (-inf = hidden), leaves the weights e^(score - max) in their place, and rescales what was before.
  __device__ __forceinline__ void weigh(Scores& scores) {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      largest = fmaxf(max[r], warp_reduce<4>(largest, Max{}));
      const float shift = exponent_shift(largest);
      rescale[r] = exponential(max[r] - shift);
      max[r] = largest;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * r + i % 2];
        score = exponential(score - shift);
        total += score;
      }
      sum[r] = sum[r] * rescale[r] + total;
    }
    // A product with 1 changes no bit, and most chunks bring no new maximum.
    if (__any_sync(kFullWarp, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][i] *= rescale[i / 2];
      }
    }
  }
};

// scores = q kᵀ for 16 rows and 16 keys.
template <class T, int DIM>
__device__ __forceinline__ void multiply_keys(Scores& scores, const uint32_t (*q_fragments)[4], const unsigned char* q_tile,
                                              const unsigned char* k_tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < DIM / 16; ++step) {
    uint32_t q[4], k[4];
    if constexpr (DIM == 256) {  // no room for q in registers
      ptx::ldmatrix_x4<false>(q, q_tile + piece_offset<DIM>(lane % 16, 2 * step + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = q_fragments[step][i];
    }
    ptx::ldmatrix_x4<false>(k, k_tile + piece_offset<DIM>(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    ptx::mma_m16n8k16<T>(scores[0], q, k[0], k[1]);
    ptx::mma_m16n8k16<T>(scores[1], q, k[2], k[3]);
  }
}

// out += weights v, the weights rounded to T.
template <class T, int DIM>
__device__ __forceinline__ void multiply_values(float (&out)[DIM / 8][4], const Scores& weights, const unsigned char* v_tile) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t p[4] = {ptx::pack<T>(weights[0][0], weights[0][1]), ptx::pack<T>(weights[0][2], weights[0][3]),
                         ptx::pack<T>(weights[1][0], weights[1][1]), ptx::pack<T>(weights[1][2], weights[1][3])};
#pragma unroll
  for (int j = 0; j < DIM / 16; ++j) {
    uint32_t v[4];
    ptx::ldmatrix_x4<true>(v, v_tile + piece_offset<DIM>(lane / 8 % 2 * 8 + lane % 8, 2 * j + lane / 16));
    ptx::mma_m16n8k16<T>(out[2 * j], p, v[0], v[1]);
    ptx::mma_m16n8k16<T>(out[2 * j + 1], p, v[2], v[3]);
  }
}

// Eight features of a row in the scratch, and its maximum and sum.
struct Slot {
  float* out;
  float* stats;
};

// `stats`: the same slot, but that those of a block's own take turns (see store_block).
__device__ __forceinline__ Slot slot_of(const DecodeAttention& call, const DecodeClass& programs, int64_t slot, int64_t stats, int row, int piece) {
  const int64_t slots = int64_t(programs.num_programs) * (programs.max_splits + 1);
  float* all_stats = programs.scratch + slots * programs.rows * call.value_dim;
  return {programs.scratch + (slot * programs.rows + row) * call.value_dim + piece * 8, all_stats + stats * 2 * programs.rows + row};
}

// Not by the first-level cache: other multiprocessors write there.
__device__ __forceinline__ RowStats load_slot(const DecodeClass& programs, const Slot& slot, float (&out)[8]) {
  const auto* from = reinterpret_cast<const float4*>(slot.out);
  const float4 low = __ldcg(from), high = __ldcg(from + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  return {__ldcg(slot.stats), __ldcg(slot.stats + programs.rows)};
}

__device__ __forceinline__ void store_slot(const DecodeClass& programs, const Slot& slot, const RowStats& row, const float (&out)[8], bool with_stats) {
  auto* to = reinterpret_cast<float4*>(slot.out);
  to[0] = float4{out[0], out[1], out[2], out[3]};
  to[1] = float4{out[4], out[5], out[6], out[7]};
  if (with_stats) {
    slot.stats[0] = row.max;
    slot.stats[programs.rows] = row.sum;
  }
}

// The end of eight features of a row.
template <class T>
__device__ __forceinline__ void finish_piece(const DecodeAttention& call, const Program& program, const Sequence& sequence, int row, int piece,
                                             const RowStats& total, const float (&out)[8]) {
  const RowPlace at = place_of(call, program.kv_head, row);
  const RowEnd end = finish_row(call, total, at.head);
  const int token = sequence.first_token + at.token;
  uint4 words;
  words.x = ptx::pack<T>(out[0] * end.factor, out[1] * end.factor);
  words.y = ptx::pack<T>(out[2] * end.factor, out[3] * end.factor);
  words.z = ptx::pack<T>(out[4] * end.factor, out[5] * end.factor);
  words.w = ptx::pack<T>(out[6] * end.factor, out[7] * end.factor);
  *reinterpret_cast<uint4*>(static_cast<T*>(call.out) + out_offset(call, program.sequence, token, at.head) + piece * 8) = words;
  if (piece == 0) store_lse(call, program.sequence, token, at.head, end.lse);
}

// The merge of the block's warps, and what becomes of the split: eight features of a row per thread and step, the same in every split.
template <class T, class Element, int DIM>
__device__ __forceinline__ void store_block(const DecodeAttention& call, const DecodeClass& programs, const Program& program, const Share& share,
                                            int split, const Sequence& sequence, const unsigned char* shared) {
  using Smem = Layout<Element, DIM>;
  constexpr int PIECES = DIM / 8;
  const auto* outs = reinterpret_cast<const float*>(shared);
  const auto* stats = reinterpret_cast<const RowStats*>(shared + Smem::STATS);
  const bool shares_rows = programs.block_rows == kTileRows;
  const int num_rows = sequence.seqlen_q * call.group, first_row = program.tile * programs.block_rows;
  const float v_scale = call.v_scale != nullptr && !call.scale_per_token ? call.v_scale[program.kv_head * call.stride_v_scale_head] : 1.0f;
  // A whole task is folded in the block's own slot, behind those of all tasks. Its statistics are read by threads that do not write them,
  // so that they lie in two places in turn.
  const int64_t shared_slots = int64_t(programs.num_programs) * programs.max_splits;
  for (int index = threadIdx.x; index < programs.block_rows * PIECES; index += blockDim.x) {
    const int row = index / PIECES, piece = index % PIECES;
    if (first_row + row >= num_rows || piece * 8 >= call.value_dim) continue;
    const int first_part = shares_rows ? 0 : row / kTileRows, parts = shares_rows ? Smem::WARPS : 1;
    RowStats total{-kInfinity, 0.0f};
    for (int part = first_part; part < first_part + parts; ++part) total.max = fmaxf(total.max, stats[part * kTileRows + row % kTileRows].max);
    const float shift = exponent_shift(total.max);
    float out[8] = {};
    for (int part = first_part; part < first_part + parts; ++part) {
      const RowStats stat = stats[part * kTileRows + row % kTileRows];
      const float weight = exponential(stat.max - shift);
      const float* from = outs + (part * kTileRows + row % kTileRows) * Smem::OUT_ROW + piece * 8;
      total.sum += weight * stat.sum;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] += weight * from[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= v_scale;
    if (!share.is_whole()) {
      const int64_t slot = int64_t(share.owner) * programs.max_splits + split;
      store_slot(programs, slot_of(call, programs, slot, slot, row, piece), total, out, piece == 0);
      continue;
    }
    const auto own = [&](int turn) {
      return slot_of(call, programs, shared_slots + blockIdx.x, shared_slots + 2 * int64_t(blockIdx.x) + turn % 2, row, piece);
    };
    RowStats folded{-kInfinity, 0.0f};
    float folded_out[8] = {};
    if (split > 0) folded = load_slot(programs, own(split - 1), folded_out);
    fold(folded, folded_out, total, out);
    if (split + 1 < share.splits) {
      store_slot(programs, own(split), folded, folded_out, piece == 0);
    } else {
      finish_piece<T>(call, program, sequence, first_row + row, piece, folded, folded_out);
    }
  }
}

// All splits of a task have been stored: folds them in ascending order.
template <class T, int DIM>
__device__ __forceinline__ void merge_splits(const DecodeAttention& call, const DecodeClass& programs, const Program& program, const Share& share,
                                             const Sequence& sequence) {
  constexpr int PIECES = DIM / 8;
  const int num_rows = sequence.seqlen_q * call.group, first_row = program.tile * programs.block_rows;
  for (int index = threadIdx.x; index < programs.block_rows * PIECES; index += blockDim.x) {
    const int row = index / PIECES, piece = index % PIECES;
    if (first_row + row >= num_rows || piece * 8 >= call.value_dim) continue;
    RowStats total{-kInfinity, 0.0f};
    float out[8] = {};
#pragma unroll(DIM == 256 ? 1 : 2)
    for (int split = 0; split < share.splits; ++split) {
      const int64_t slot = int64_t(share.owner) * programs.max_splits + split;
      float split_out[8];
      const RowStats stats = load_slot(programs, slot_of(call, programs, slot, slot, row, piece), split_out);
      fold(total, out, stats, split_out);
    }
    finish_piece<T>(call, program, sequence, first_row + row, piece, total, out);
  }
}

// Counts the splits that the block has stored; whether they were the task's last ones, so that all can be read. All threads call it.
__device__ __forceinline__ bool count_splits(const DecodeClass& programs, const Share& share, unsigned char* shared) {
  auto* is_last = reinterpret_cast<int*>(shared);
  __syncthreads();  // every thread has stored its part
  if (threadIdx.x == 0) {
    const int count = share.end_split - share.first_split;
    __threadfence();  // and that is seen before the count is
    *is_last = atomicAdd(programs.counters + share.owner, count) + count == share.splits;
    __threadfence();  // what others stored before they counted is seen from here on
    if (*is_last) programs.counters[share.owner] = 0;  // the next launch finds it as this one did
  }
  __syncthreads();
  return *is_last != 0;
}

// Barrier of those who share tiles: the block, or the warp alone.
__device__ __forceinline__ void sync_tiles(bool shares_rows) {
  if (shares_rows) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Outputs, maxima and sums of the block's warps over the keys [first_key, end_key), in shared memory for store_block.
template <class T, class Element, int DIM>
__device__ __forceinline__ void attend(const DecodeAttention& call, const DecodeClass& programs, const Program& program, const Sequence& sequence,
                                       int first_key, int end_key, unsigned char* shared) {
  using Smem = Layout<Element, DIM>;
  constexpr int WARPS = kWarps<DIM>, STEP_KEYS = WARPS * kChunkKeys;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_rows = sequence.seqlen_q * call.group, first_row = program.tile * programs.block_rows;
  const KeyRange range = tile_keys(call, sequence, first_row, programs.block_rows);
  const int end = min(range.high, end_key), begin = max(first_key, range.low / STEP_KEYS * STEP_KEYS);
  const bool shares_rows = programs.block_rows == kTileRows;

  // The first copies start before anything else. Page numbers are read a step ahead of the copies that need them.
  const CachePlace place = cache_place<Element>(call, program);
  const int steps = begin < end ? ceil_div(end - begin, STEP_KEYS) : 0;
  const int lane_key = begin + warp * kChunkKeys + lane % kChunkKeys;
  const auto next_page = [&](int step) {
    const int key = lane_key + step * STEP_KEYS;
    return page_of(call, place, sequence.leftpad + key, key >= range.low && key < end);
  };
  const auto stage_of = [&](int step, int of_warp) { return shared + (step % kStages * WARPS + of_warp) * Smem::STAGE; };
  int page = next_page(0);
  if (steps > 0) copy_chunk<Element, DIM>(call, place, stage_of(0, warp), page, sequence.leftpad + lane_key);
  ptx::cp_async_commit();
  page = next_page(1);

  unsigned char* q_tiles = shared + Smem::Q;
  load_queries<T, DIM>(call, program, sequence, first_row, programs.block_rows, q_tiles);
  if constexpr (Smem::WIDENED) {
    clear_padding<DIM>(call, shared + Smem::TILES, WARPS, Smem::TILE);
  } else {
    clear_padding<DIM>(call, shared, kStages * WARPS, Smem::STAGE);
  }
  __syncthreads();
  const int warp_row = first_row + (shares_rows ? 0 : warp * kTileRows);
  const unsigned char* q_tile = q_tiles + (warp_row - first_row) * DIM * 2;
  uint32_t q_fragments[DIM / 16][4];
  if constexpr (DIM < 256) {
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
      ptx::ldmatrix_x4<false>(q_fragments[step], q_tile + piece_offset<DIM>(lane % 16, 2 * step + lane / 16));
    }
  }

  LaneRows rows;
  for (int r = 0; r < 2; ++r) {
    rows.row[r] = warp_row + lane / 4 + 8 * r;
    const int token = rows.row[r] / call.group;
    const KeyRange seen = visible_keys(call, sequence, token, token);
    rows.low[r] = seen.low;
    rows.high[r] = rows.row[r] < num_rows ? min(seen.high, end) : 0;
  }
  // What the warp's rows see together: chunks outside would change no bit.
  const KeyRange warp_range = warp_row < num_rows ? tile_keys(call, sequence, warp_row, kTileRows) : KeyRange{0, 0};
  const bool has_terms = call.softcap > 0.0f || call.bias != nullptr || call.alibi_slopes != nullptr || call.mask != nullptr;
  float score_scale = call.softmax_scale;
  if (call.k_scale != nullptr && !call.scale_per_token) score_scale *= place.k_scale[0];

  Accumulator<DIM> total;
  total.clear();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy_chunk<Element, DIM>(call, place, stage_of(step + 1, warp), page, sequence.leftpad + lane_key + (step + 1) * STEP_KEYS);
      page = next_page(step + 2);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    if constexpr (Smem::WIDENED) {
      __syncwarp();
      unsigned char* tile = shared + Smem::TILES + warp * Smem::TILE;
      const unsigned char* stage = stage_of(step, warp);
      const auto* scales = reinterpret_cast<const float*>(stage + 2 * Smem::KEYS);
      const bool is_float8 = call.cache_type == ElementType::float8_e4m3fn;
      widen_rows<T, DIM>(tile, stage, call.head_dim, is_float8);
      if (kScalesValues<T> && call.scale_per_token) {
        widen_rows<T, DIM, kScalesValues<T>>(tile + Smem::TILE / 2, stage + Smem::KEYS, call.value_dim, is_float8, scales + kChunkKeys);
      } else {
        widen_rows<T, DIM>(tile + Smem::TILE / 2, stage + Smem::KEYS, call.value_dim, is_float8);
      }
    }
    sync_tiles(shares_rows);
    for (int chunk = shares_rows ? warp : 0; chunk < (shares_rows ? warp + 1 : WARPS); ++chunk) {
      const int chunk_key = begin + step * STEP_KEYS + chunk * kChunkKeys;
      if (chunk_key >= min(warp_range.high, end) || chunk_key + kChunkKeys <= warp_range.low) continue;
      const unsigned char* stage = stage_of(step, chunk);
      const unsigned char* tile = Smem::WIDENED ? shared + Smem::TILES + chunk * Smem::TILE : stage;
      Scores scores;
      multiply_keys<T, DIM>(scores, q_fragments, q_tile, tile);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float factor = score_scale;
        if constexpr (Smem::WIDENED) {
          if (call.scale_per_token) {
            factor *= reinterpret_cast<const float*>(stage + 2 * Smem::KEYS)[i / 4 * 8 + 2 * (lane % 4) + i % 2];
          }
        }
        scores[i / 4][i % 4] *= factor;
      }
      if (has_terms) add_score_terms(call, program, sequence, rows, chunk_key, scores);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = chunk_key + i / 4 * 8 + 2 * (lane % 4) + i % 2, r = i % 4 / 2;
        if (key < rows.low[r] || key >= rows.high[r]) scores[i / 4][i % 4] = -kInfinity;
      }
      total.weigh(scores);
      if constexpr (Smem::WIDENED && !kScalesValues<T>) {
        if (call.scale_per_token) {
          const auto* scales = reinterpret_cast<const float*>(stage + 2 * Smem::KEYS) + kChunkKeys + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= scales[i / 4 * 8 + i % 2];
        }
      }
      multiply_values<T, DIM>(total.out, scores, tile + kChunkKeys * DIM * 2);
    }
    sync_tiles(shares_rows);  // the next copies overwrite this stage
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  auto* outs = reinterpret_cast<float*>(shared) + (warp * kTileRows + lane / 4) * Smem::OUT_ROW + 2 * (lane % 4);
  auto* stats = reinterpret_cast<RowStats*>(shared + Smem::STATS) + warp * kTileRows + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < DIM / 8; ++j) {
      *reinterpret_cast<float2*>(outs + 8 * r * Smem::OUT_ROW + 8 * j) = float2{total.out[j][2 * r], total.out[j][2 * r + 1]};
    }
    const float sum = warp_reduce<4>(total.sum[r], Sum{});
    if (lane % 4 == 0) stats[8 * r] = {total.max[r], sum};
  }
  __syncthreads();
}

// Two blocks to an SM are meant: without that said, ptxas saves registers for more, by spilling.
template <class T, class Element, int DIM>
__global__ void __launch_bounds__(kWarps<DIM>* kWarpSize, 2) decode_kernel(const DecodeAttention call, const DecodeClass programs) {
  using Smem = Layout<Element, DIM>;
  constexpr int STEP_KEYS = kWarps<DIM> * kChunkKeys;
  PYT_DYNAMIC_SHARED(shared);
  // In shared memory: the registers are for the loop over the keys.
  Work& work = *reinterpret_cast<Work*>(shared + Smem::work(programs.block_rows));
  const Stretch stretch = programs.scratch == nullptr ? stretch_of_one_task(call, programs) : stretch_of(call, programs, STEP_KEYS);
  if (threadIdx.x == 0) begin_work(call, programs, work, stretch, STEP_KEYS);
  __syncthreads();
  while (work.has_split) {
    const int first_key = (work.steps.first + split_start(work.steps, work.split)) * STEP_KEYS;
    const int end_key = (work.steps.first + split_start(work.steps, work.split + 1)) * STEP_KEYS;
    attend<T, Element, DIM>(call, programs, work.program, sequence_of(call, work.program.sequence), first_key, end_key, shared);
    store_block<T, Element, DIM>(call, programs, work.program, work.share, work.split, sequence_of(call, work.program.sequence), shared);
    const bool ends_share = work.is_last_of_share() && !work.share.is_whole();
    __syncthreads();  // what follows overwrites what was read here
    if (ends_share) {
      if (count_splits(programs, work.share, shared)) {
        merge_splits<T, DIM>(call, programs, work.program, work.share, sequence_of(call, work.program.sequence));
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) next_split(call, programs, work, STEP_KEYS);
    __syncthreads();
  }
}

template <class T, class Element, int DIM>
void launch_decode(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  launch("decode_kernel", &decode_kernel<T, Element, DIM>, dim3(static_cast<unsigned>(programs.num_programs)), dim3(kWarps<DIM> * kWarpSize),
         Layout<Element, DIM>::bytes(programs.block_rows), stream, call, programs);
}

// For queries of type T and a cache of Element: T, or int8_t for codes of 8 bits. Each is compiled on its own (split_instances.cu).
template <class T, class Element>
void launch_decode(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream);

}  // namespace pytransformer::decode
