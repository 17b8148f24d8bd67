// dQ: a block owns a tile of queries and walks over the keys that they see. Each warp has rows of its own, so nothing passes between warps:
// S = Q Kᵀ, dP = dO Vᵀ, dS = P ∘ (dP - delta) in registers, dQ += dS K.
#pragma once

#include "backward_tile.cuh"

namespace pytransformer {

// Sizes that are compiled in.
template <int WIDTH>
struct QueryTiles {
  static constexpr int kSlices = WIDTH <= 128 ? 2 : 1;  // of 16 queries: a warp's sums are 16 · kSlices · WIDTH, at most 128 registers
  static constexpr int kRowsPerWarp = 16 * kSlices;
  static constexpr int kWarps = 4;
  static constexpr int kQueries = kWarps * kRowsPerWarp;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = 32;  // visited at a time; more would need the registers of twice as many scores

  // Bytes of shared memory: queries, their dO and two statistics of each, what a score is; stages of keys and values.
  static constexpr int kStatistics = 2 * kQueries * 4, kScores = 32;
  static constexpr int shared_bytes(int stages) { return 2 * kQueries * WIDTH * 2 + kStatistics + kScores + stages * 2 * kKeys * WIDTH * 2; }
};

// The weights of a warp's queries and a tile of keys, times softcap's slope, in the place of their products.
template <int SLICES, int KEYS, bool TERMS, bool MASKED, bool SOFTCAP>
__device__ __forceinline__ void weigh(float (&products)[SLICES][KEYS / 8][4], const float* shifts, const Scores<TERMS>& scores,
                                      const Sight& sight, int32_t start_m, int32_t start_n) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const float shift = shifts[row];
      const int32_t query = start_m + row;
      const PositionRange seen = sight.keys_of(query);
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& product = products[m][n][2 * half + i];
          const int32_t key = start_n + n * 8 + lane % 4 * 2 + i;
          float slope;
          const float weight = weight_of<TERMS, SOFTCAP>(product, shift, sight.distance(query, key), scores, slope);
          product = !MASKED || seen.has(key) ? weight * slope : 0.0f;
        }
      }
    }
  }
}

// dS = P ∘ (dP - delta) in the place of the weights.
template <int SLICES, int KEYS>
__device__ __forceinline__ void score_gradients(float (&weights)[SLICES][KEYS / 8][4], const float (&weight_gradients)[SLICES][KEYS / 8][4],
                                                const float* deltas) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float delta = deltas[m * 16 + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) weights[m][n][i] *= weight_gradients[m][n][i] - delta;
      }
    }
  }
}

template <class T, int WIDTH, bool TERMS>
__global__ void __launch_bounds__(QueryTiles<WIDTH>::kThreads, 1)
    attention_backward_dq_kernel(const AttentionBackward backward, Schedule schedule, int stages) {
  using Tiles = QueryTiles<WIDTH>;
  constexpr int SLICES = Tiles::kSlices, QUERIES = Tiles::kQueries, KEYS = Tiles::kKeys, THREADS = Tiles::kThreads;
  const AttentionCall& call = backward.call;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * Tiles::kRowsPerWarp;

  const Place place = find_place<QUERIES>(tile_and_slot(schedule, call.window_right != kUnlimited), call.batch, call.num_heads,
                                          call.cu_seqlens_q, call.seqlen_q, call.cu_seqlens_k, call.seqlen_k);
  const int32_t start_m = place.start, kv_head = place.head / (call.num_heads / call.num_kv_heads);
  if (start_m >= place.length) return;
  const Sight sight{place.length, place.other_length, call.window_left, call.window_right};
  const int32_t diagonal = place.other_length - place.length;
  const TileRange range = tile_range(start_m, min(start_m + QUERIES, place.length) - 1, diagonal - call.window_left,
                                     diagonal + call.window_right, place.other_length, KEYS);

  PYT_DYNAMIC_SHARED(shared);
  T* const queries = reinterpret_cast<T*>(shared);
  T* const gradients = queries + QUERIES * WIDTH;
  // A step needs these once, and registers are short.
  auto* const statistics = reinterpret_cast<float*>(gradients + QUERIES * WIDTH);
  auto& shared_scores = *reinterpret_cast<Scores<TERMS>*>(statistics + 2 * QUERIES);
  static_assert(sizeof shared_scores <= Tiles::kScores);
  T* const first_stage = gradients + QUERIES * WIDTH + (Tiles::kStatistics + Tiles::kScores) / sizeof(T);
  const auto load_keys = [&](int32_t tile) {
    T* const keys = first_stage + (tile & (stages - 1)) * (2 * KEYS * WIDTH);
    const int32_t start_n = tile * KEYS, rows_left = place.other_length - start_n;
    load_tile_async<KEYS, WIDTH, THREADS>(
        keys, row_address(static_cast<const T*>(call.k), call.stride_k, place.sequence, place.other_first, start_n, kv_head), call.stride_k.row,
        rows_left, call.head_dim);
    load_tile_async<KEYS, WIDTH, THREADS>(
        keys + KEYS * WIDTH, row_address(static_cast<const T*>(call.v), call.stride_v, place.sequence, place.other_first, start_n, kv_head),
        call.stride_v.row, rows_left, call.value_dim);
    ptx::cp_async_commit();
  };

  if (range.begin < range.end) {
    load_tile_async<QUERIES, WIDTH, THREADS>(
        queries, row_address(static_cast<const T*>(call.q), call.stride_q, place.sequence, place.first, start_m, place.head), call.stride_q.row,
        place.length - start_m, call.head_dim);
    load_tile_async<QUERIES, WIDTH, THREADS>(
        gradients, row_address(static_cast<const T*>(backward.dout), backward.stride_dout, place.sequence, place.first, start_m, place.head),
        backward.stride_dout.row, place.length - start_m, call.value_dim);
    const float* const source = backward.workspace + statistic_index(call, place.sequence, place.first, place.head) + start_m;
    for (int row = threadIdx.x; row < QUERIES; row += THREADS) {
      const bool exists = row < place.length - start_m;
      statistics[row] = exists ? source[row] : kInfinity;
      statistics[QUERIES + row] = exists ? source[num_statistics(call) + row] : 0.0f;
    }
    if (TERMS && threadIdx.x == 0) shared_scores = Scores<TERMS>(call, place.sequence, place.head);
    load_keys(range.begin);
  }
  float sums[SLICES][WIDTH / 8][4] = {};
  for (int32_t tile = range.begin; tile < range.end; ++tile) {
    const T* const keys = first_stage + (tile & (stages - 1)) * (2 * KEYS * WIDTH);
    if (stages == 1 && tile > range.begin) {
      __syncthreads();  // no thread reads the only stage any more
      load_keys(tile);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has landed for every thread, and none reads the other any more
    if (stages > 1 && tile + 1 < range.end) load_keys(tile + 1);

    if (sight.any(start_m + warp_row, Tiles::kRowsPerWarp, tile * KEYS, KEYS)) {
      float products[SLICES][KEYS / 8][4] = {};
      multiply_rows<WIDTH, SLICES, KEYS>(products, queries, warp_row, keys);
      const Scores<TERMS> scores = TERMS ? shared_scores : Scores<TERMS>(call, place.sequence, place.head);
      with_constants<TERMS>(!sight.all(start_m + warp_row, Tiles::kRowsPerWarp, tile * KEYS, KEYS), scores.has_softcap,
                            [&](auto masked, auto softcap) {
                              weigh<SLICES, KEYS, TERMS, masked.value, softcap.value>(products, statistics + warp_row, scores, sight,
                                                                                      start_m + warp_row, tile * KEYS);
                            });
      float weight_gradients[SLICES][KEYS / 8][4] = {};
      multiply_rows<WIDTH, SLICES, KEYS>(weight_gradients, gradients, warp_row, keys + KEYS * WIDTH);
      score_gradients<SLICES, KEYS>(products, weight_gradients, statistics + QUERIES + warp_row);
      accumulate_product<WIDTH, SLICES, KEYS>(sums, products, keys);
    }
  }

  const RowStrides strides = contiguous_strides(call.is_packed(), call.seqlen_q, call.num_heads, call.head_dim);
  __syncwarp();  // the rows of a warp are read by its other lanes
  write_sums<WIDTH, SLICES>(row_address(static_cast<T*>(backward.dq), strides, place.sequence, place.first, start_m + warp_row, place.head),
                          strides.row, place.length - start_m - warp_row, call.head_dim, sums, call.softmax_scale, queries, warp_row);
}

template <class T, int WIDTH, bool TERMS>
void launch_dq(const AttentionBackward& backward, CUstream_st* stream) {
  using Tiles = QueryTiles<WIDTH>;
  static_assert(Tiles::shared_bytes(1) <= kLeastSharedMemory);
  const AttentionCall& call = backward.call;
  const Schedule schedule =
      make_schedule(call, call.seqlen_q, call.num_heads, call.num_heads / call.num_kv_heads, Tiles::kQueries);
  const int stages = choose_stages(Tiles::shared_bytes(1), Tiles::shared_bytes(2), device_limits());
  launch("attention_backward_dq_kernel", &attention_backward_dq_kernel<T, WIDTH, TERMS>, dim3(static_cast<unsigned>(schedule.num_blocks())),
         dim3(Tiles::kThreads), Tiles::shared_bytes(stages), stream, backward, schedule, stages);
}

}  // namespace pytransformer
