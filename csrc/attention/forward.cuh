// Attention forward on the tensor cores of sm_80 and newer: out = softmax(scores) v and the log-sum-exp of each row.
//
// A block owns BLOCK_M queries of one head and walks over the key tiles that they see. Scores live in the accumulators of mma.m16n8k16 only, and
// become the first operand of the product with v there (Milakov & Gimelshein 2018; Dao 2023). Cost: 4 batch heads Lq Lk d FLOP (half if causal);
// q, k, v read and out, lse written once as far as L2 serves the other blocks' reads of k and v.
//
// Keys and values pass through one buffer each, in turns: while one is multiplied the other is loaded.
#pragma once

#include "tile.cuh"

namespace pytransformer {

// What a block has to do. It lies in shared memory, as each step needs little of it and registers are short.
struct ForwardPlan {
  Place place;
  TileRange tiles;
  int32_t num_cut;    // of the tiles, those that are not seen whole
  const void *k, *v;  // the sequence's first key and value of the head
};

// Tile sizes for features padded to WIDTH.
//
// A warp owns 16 or 32 rows. 32 rows use each fragment of k and v twice, which halves the reads of shared memory that bound 16 rows, and
// need WIDTH / 2 registers for the output and 32 for the scores of 64 keys... of 255. At WIDTH 256 there is room for 16 rows only.
template <int WIDTH>
struct ForwardTiles {
  static constexpr int kWarps = 4;
  static constexpr int kRowsPerWarp = WIDTH <= 128 ? 32 : 16;
  static constexpr int kBlockM = kWarps * kRowsPerWarp;
  static constexpr int kBlockN = 64;
  // 32, 64 and 96 KB: two blocks per SM and more, but for WIDTH 256 on GPUs with less than 192 KB.
  static constexpr int kTileBytes = 2 * WIDTH * (kBlockM + 2 * kBlockN);
  static constexpr int kSharedBytes = kTileBytes + sizeof(ForwardPlan);
};

template <class T, int WIDTH, bool TERMS>
class ForwardWarp {
  using Tiles = ForwardTiles<WIDTH>;
  static constexpr int M_TILES = Tiles::kRowsPerWarp / 16, KEY_BLOCKS = Tiles::kBlockN / 16;
  // Where the last quarter of the features is padding it is not multiplied: 96 of 128, 192 of 256.
  static constexpr int MOST = WIDTH / 16 * 3 / 4, ALL = WIDTH / 16;

 public:
  __device__ __forceinline__ ForwardWarp(const AttentionCall& call, const Place& place, const T* q_tile, const T* k_tile, const T* v_tile)
      : call_(call), scores_(call, place.sequence, place.head), read_q_(q_tile), read_k_(k_tile), read_v_(v_tile) {
    first_row_ = static_cast<int>(threadIdx.x / kWarpSize) * Tiles::kRowsPerWarp;
    const int lane = threadIdx.x % kWarpSize;
    num_keys_ = place.other_length - lane % 4 * 2;
    distance_ = place.start + first_row_ + lane / 4 - place.length + num_keys_;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      maximum_[m][0] = maximum_[m][1] = -kInfinity;
      sum_[m][0] = sum_[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * ALL; ++n) out_[m][n][0] = out_[m][n][1] = out_[m][n][2] = out_[m][n][3] = 0.0f;
    }
  }

  // s = q kᵀ with the keys that are in their tile.
  __device__ __forceinline__ void multiply_keys() {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * KEY_BLOCKS; ++n) s_[m][n][0] = s_[m][n][1] = s_[m][n][2] = s_[m][n][3] = 0.0f;
    }
    multiply_features<0, MOST>();
    if (call_.head_dim > MOST * 16) multiply_features<MOST, ALL>();
  }

  // Scores of the tile of keys from first_key on become weights; what was summed up before is scaled to the new maximum. MASKED: the window
  // or the end of the keys cuts the tile.
  template <bool MASKED>
  __device__ __forceinline__ void exponentiate(int first_key) {
    scores_.cap(s_);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) exponentiate_row<MASKED>(m, half, first_key);
#pragma unroll
      for (int keys = 0; keys < KEY_BLOCKS; ++keys) accumulators_as_a<T>(weights_[m][keys], s_[m][2 * keys], s_[m][2 * keys + 1]);
    }
  }

  // out += weights v with the values that are in their tile.
  __device__ __forceinline__ void multiply_values() {
    multiply_value_features<0, MOST>();
    if (call_.value_dim > MOST * 16) multiply_value_features<MOST, ALL>();
  }

  // Divides by the sums and writes out and lse, through this warp's own rows of `staging`.
  __device__ __forceinline__ void finish(const AttentionForward& forward, const Place& place, T* staging) {
    const int rows_left = place.length - place.start - first_row_, lane = threadIdx.x % kWarpSize;
    float* lse = forward.lse + statistic_index(call_, place.sequence, place.first, place.head) + place.start + first_row_;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_reduce(sum_[m][half], Sum{});
        const float inverse = sum == 0.0f ? 1.0f : 1.0f / sum;
#pragma unroll
        for (int n = 0; n < 2 * ALL; ++n) {
          out_[m][n][2 * half] *= inverse;
          out_[m][n][2 * half + 1] *= inverse;
        }
        const int row = 16 * m + 8 * half + lane / 4;
        if (lane % 4 == 0 && row < rows_left) lse[row] = sum == 0.0f ? -kInfinity : scores_.log_sum(maximum_[m][half], sum);
      }
#pragma unroll
      for (int n = 0; n < 2 * ALL; ++n) store_accumulator<WIDTH>(staging, first_row_ + 16 * m, 8 * n, out_[m][n]);
    }
    __syncwarp();
    const RowStrides strides = contiguous_strides(call_.is_packed(), call_.seqlen_q, call_.num_heads, call_.value_dim);
    T* rows = row_address(static_cast<T*>(forward.out), strides, place.sequence, place.first, place.start + first_row_, place.head);
    write_rows<Tiles::kRowsPerWarp, WIDTH>(rows, strides.row, rows_left, call_.value_dim, staging, first_row_);
  }

 private:
  template <int BEGIN, int END>
  __device__ __forceinline__ void multiply_features() {
#pragma unroll
    for (int d = BEGIN; d < END; ++d) {
      uint32_t q[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) read_q_.read(q[m], first_row_ + 16 * m, 16 * d);
#pragma unroll
      for (int keys = 0; keys < KEY_BLOCKS; ++keys) {
        uint32_t k[4];
        read_k_.read(k, 16 * keys, 16 * d);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(s_[m][2 * keys], q[m], k[0], k[1]);
          ptx::mma_m16n8k16<T>(s_[m][2 * keys + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  template <int BEGIN, int END>
  __device__ __forceinline__ void multiply_value_features() {
#pragma unroll
    for (int keys = 0; keys < KEY_BLOCKS; ++keys) {
#pragma unroll
      for (int d = BEGIN; d < END; ++d) {
        uint32_t v[4];
        read_v_.read(v, 16 * keys, 16 * d);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          ptx::mma_m16n8k16<T>(out_[m][2 * d], weights_[m][keys], v[0], v[1]);
          ptx::mma_m16n8k16<T>(out_[m][2 * d + 1], weights_[m][keys], v[2], v[3]);
        }
      }
    }
  }

  template <bool MASKED>
  __device__ __forceinline__ void exponentiate_row(int m, int half, int first_key) {
    const int distance = distance_ - first_key + 16 * m + 8 * half;
    const KeyRange visible = visible_keys(call_, distance, num_keys_ - first_key);
    float tile_maximum = -kInfinity;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 8 * n + i;
        float& s = s_[m][n][2 * half + i];
        s = scores_.with_distance(s, distance - key);
        if (MASKED && !visible.has(key)) s = -kInfinity;
        tile_maximum = fmaxf(tile_maximum, s);
      }
    }
    tile_maximum = row_reduce(tile_maximum, Max{});
    if (!MASKED || tile_maximum != -kInfinity) tile_maximum = scores_.shift_of(tile_maximum);
    const float new_maximum = fmaxf(maximum_[m][half], tile_maximum);
    // A row that has seen nothing yet has no maximum to subtract.
    const float shift = MASKED && new_maximum == -kInfinity ? 0.0f : new_maximum;
    const float rescale = scores_.rescale(maximum_[m][half], shift);
    maximum_[m][half] = new_maximum;
    float sum = sum_[m][half] * rescale;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = s_[m][n][2 * half + i];
        s = scores_.weight(s, shift);
        sum += s;
      }
    }
    sum_[m][half] = sum;
#pragma unroll
    for (int n = 0; n < 2 * ALL; ++n) {
      out_[m][n][2 * half] *= rescale;
      out_[m][n][2 * half + 1] *= rescale;
    }
  }

  const AttentionCall& call_;
  const Scores<TERMS> scores_;
  const ReadA<T, WIDTH> read_q_;
  const ReadTransposedB<T, WIDTH> read_k_;
  const ReadB<T, WIDTH> read_v_;
  int first_row_;           // of this warp in the block's tile
  int distance_, num_keys_;  // of this thread's first row from its first key, and keys from that one on
  float out_[M_TILES][2 * ALL][4];
  float s_[M_TILES][2 * KEY_BLOCKS][4];
  uint32_t weights_[M_TILES][KEY_BLOCKS][4];
  float maximum_[M_TILES][2], sum_[M_TILES][2];  // the sums are of this thread's columns; shifts of Scores::weight
};

template <class T, class Tiles>
__device__ __forceinline__ void make_plan(ForwardPlan& plan, const AttentionCall& call, const Place& place) {
  const int32_t diagonal = place.other_length - place.length, kv_head = place.head / (call.num_heads / call.num_kv_heads);
  plan.place = place;
  plan.tiles = tile_range(place.start, min(place.start + Tiles::kBlockM, place.length) - 1, diagonal - call.window_left,
                          diagonal + call.window_right, place.other_length, Tiles::kBlockN);
  plan.num_cut = plan.tiles.end - plan.tiles.whole_end + plan.tiles.whole_begin - plan.tiles.begin;
  plan.k = row_address(static_cast<const T*>(call.k), call.stride_k, place.sequence, place.other_first, 0, kv_head);
  plan.v = row_address(static_cast<const T*>(call.v), call.stride_v, place.sequence, place.other_first, 0, kv_head);
}

template <class T, int WIDTH, bool TERMS>
__global__ void __launch_bounds__(ForwardTiles<WIDTH>::kWarps* kWarpSize, 2)
    attention_forward_kernel(const AttentionForward forward, const Schedule schedule) {
  using Tiles = ForwardTiles<WIDTH>;
  constexpr int THREADS = Tiles::kWarps * kWarpSize;
  const AttentionCall& call = forward.call;
  const Place place = find_place<Tiles::kBlockM>(tile_and_slot(schedule, call.window_right != kUnlimited), call.batch, call.num_heads,
                                                 call.cu_seqlens_q, call.seqlen_q, call.cu_seqlens_k, call.seqlen_k);
  if (place.start >= place.length) return;
  PYT_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* k_tile = q_tile + Tiles::kBlockM * WIDTH;
  T* v_tile = k_tile + Tiles::kBlockN * WIDTH;
  ForwardPlan& plan = *reinterpret_cast<ForwardPlan*>(shared + Tiles::kTileBytes);
  if (threadIdx.x == 0) make_plan<T, Tiles>(plan, call, place);
  __syncthreads();

  // The other operand of a step, while it multiplies the first.
  const auto load = [&](T* tile, const void* rows, int64_t stride, int32_t number, int32_t features) {
    const int32_t first = number * Tiles::kBlockN;
    load_tile_async<Tiles::kBlockN, WIDTH, THREADS>(tile, static_cast<const T*>(rows) + first * stride, stride,
                                                    plan.place.other_length - first, features);
    ptx::cp_async_commit();
  };
  ForwardWarp<T, WIDTH, TERMS> warp(call, place, q_tile, k_tile, v_tile);
  // Tiles that all rows see whole come first, then those that an edge cuts: on to the end, and then from the beginning.
  int tile = plan.tiles.whole_begin < plan.tiles.end ? plan.tiles.whole_begin : plan.tiles.begin;
  int left = plan.tiles.end - plan.tiles.begin;
  if (left > 0) {
    const T* q = row_address(static_cast<const T*>(call.q), call.stride_q, place.sequence, place.first, place.start, place.head);
    load_tile_async<Tiles::kBlockM, WIDTH, THREADS>(q_tile, q, call.stride_q.row, place.length - place.start, call.head_dim);
    load(k_tile, plan.k, call.stride_k.row, tile, call.head_dim);
  }
  const auto step = [&](auto masked) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the keys are there, and all are done with the values of the tile before
    load(v_tile, plan.v, call.stride_v.row, tile, call.value_dim);
    warp.multiply_keys();
    warp.template exponentiate<decltype(masked)::value>(tile * Tiles::kBlockN);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the values are there, and all are done with the keys
    tile = tile + 1 == plan.tiles.end ? plan.tiles.begin : tile + 1;
    if (--left > 0) load(k_tile, plan.k, call.stride_k.row, tile, call.head_dim);
    warp.multiply_values();
  };
#pragma unroll 1
  while (left > plan.num_cut) step(std::false_type{});
#pragma unroll 1
  while (left > 0) step(std::true_type{});
  warp.finish(forward, plan.place, q_tile);
}

template <class T, int WIDTH, bool TERMS>
void launch_attention_forward(const AttentionForward& forward, CUstream_st* stream) {
  using Tiles = ForwardTiles<WIDTH>;
  const AttentionCall& call = forward.call;
  const Schedule schedule = make_schedule(call, call.seqlen_q, call.num_heads, call.num_heads / call.num_kv_heads, Tiles::kBlockM);
  launch("attention_forward_kernel", &attention_forward_kernel<T, WIDTH, TERMS>, dim3(static_cast<unsigned>(schedule.num_blocks())),
         dim3(Tiles::kWarps * kWarpSize), Tiles::kSharedBytes, stream, forward, schedule);
}

}  // namespace pytransformer
