// dQ: a block owns a tile of queries and walks over the keys that they see. Each warp has rows of its own, so nothing passes between warps:
// S = Q Kᵀ, dP = dO Vᵀ, dS = P ∘ (dP - delta) in registers, dQ += dS K.
#pragma once

#include "backward_tile.cuh"

namespace pytransformer {

// Sizes that are compiled in, chosen so that the smallest GPUs served (99 KiB of shared memory) run them with one stage.
template <int WIDTH>
struct QueryTiles {
  static constexpr int kSlices = WIDTH <= 128 ? 2 : 1;  // of 16 queries: a warp's sums are 16 · kSlices · WIDTH, at most 128 registers
  static constexpr int kRowsPerWarp = 16 * kSlices;
  static constexpr int kWarps = 4;
  static constexpr int kQueries = kWarps * kRowsPerWarp;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = 32;  // visited at a time; more would need the registers of twice as many scores

  // Bytes of shared memory: queries and their dO, and stages of keys and values.
  static constexpr int shared_bytes(int stages) { return 2 * kQueries * WIDTH * 2 + stages * 2 * kKeys * WIDTH * 2; }
};

// dS of a warp's queries and a tile of keys, from the products of both kinds, in the place of the first.
template <int SLICES, int KEYS, bool TERMS>
__device__ __forceinline__ void score_gradients(float (&products)[SLICES][KEYS / 8][4], const float (&weight_gradients)[SLICES][KEYS / 8][4],
                                                const float (&shifts)[SLICES][2], const float (&deltas)[SLICES][2],
                                                const Scores<TERMS>& scores, const Sight& sight, int32_t start_m, int32_t start_n) {
  const int lane = threadIdx.x % kWarpSize;
  const bool whole = sight.all(start_m, 16 * SLICES, start_n, KEYS);
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t query = start_m + m * 16 + lane / 4 + i / 2 * 8, key = start_n + n * 8 + lane % 4 * 2 + i % 2;
        float slope;
        float weight = weight_of(products[m][n][i], shifts[m][i / 2], sight.distance(query, key), scores, slope);
        if (!whole && !sight.sees(query, key)) weight = 0.0f;
        products[m][n][i] = weight * slope * (weight_gradients[m][n][i] - deltas[m][i / 2]);
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
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warp_row = warp * Tiles::kRowsPerWarp;

  const Place place = find_place<QUERIES>(tile_and_slot(schedule, call.window_right != kUnlimited), call.batch, call.num_heads,
                                          call.cu_seqlens_q, call.seqlen_q, call.cu_seqlens_k, call.seqlen_k);
  const int32_t start_m = place.start, kv_head = place.head / (call.num_heads / call.num_kv_heads);
  if (start_m >= place.length) return;
  const Sight sight{place.length, place.other_length, call.window_left, call.window_right};
  const int64_t diagonal = static_cast<int64_t>(place.other_length) - place.length;
  const TileRange range = tile_range(start_m, min(start_m + QUERIES, place.length) - 1, diagonal - call.window_left,
                                     diagonal + call.window_right, place.other_length, KEYS);

  PYT_DYNAMIC_SHARED(shared);
  T* const queries = reinterpret_cast<T*>(shared);
  T* const gradients = queries + QUERIES * WIDTH;
  T* const first_stage = gradients + QUERIES * WIDTH;
  int32_t loaded = range.begin;
  const auto load_step = [&] {
    T* const keys = first_stage + loaded % stages * (2 * KEYS * WIDTH);
    const int32_t start_n = loaded * KEYS, rows_left = place.other_length - start_n;
    load_tile_async<KEYS, WIDTH, THREADS>(
        keys, row_address(static_cast<const T*>(call.k), call.stride_k, place.sequence, place.other_first, start_n, kv_head), call.stride_k.row,
        rows_left, call.head_dim);
    load_tile_async<KEYS, WIDTH, THREADS>(
        keys + KEYS * WIDTH, row_address(static_cast<const T*>(call.v), call.stride_v, place.sequence, place.other_first, start_n, kv_head),
        call.stride_v.row, rows_left, call.value_dim);
    ptx::cp_async_commit();
    ++loaded;
  };

  float shifts[SLICES][2], deltas[SLICES][2];
  const float* const statistics = backward.workspace + statistic_index(call, place.sequence, place.first, place.head);
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = start_m + warp_row + m * 16 + half * 8 + lane / 4;
      const bool exists = row < place.length;
      shifts[m][half] = exists ? statistics[row] : kInfinity;
      deltas[m][half] = exists ? statistics[num_statistics(call) + row] : 0.0f;
    }
  }
  if (range.begin < range.end) {
    load_tile_async<QUERIES, WIDTH, THREADS>(
        queries, row_address(static_cast<const T*>(call.q), call.stride_q, place.sequence, place.first, start_m, place.head), call.stride_q.row,
        place.length - start_m, call.head_dim);
    load_tile_async<QUERIES, WIDTH, THREADS>(
        gradients, row_address(static_cast<const T*>(backward.dout), backward.stride_dout, place.sequence, place.first, start_m, place.head),
        backward.stride_dout.row, place.length - start_m, call.value_dim);
    load_step();
  }
  const Scores<TERMS> scores(call, place.sequence, place.head);
  float sums[SLICES][WIDTH / 8][4] = {};
  for (int32_t tile = range.begin; tile < range.end; ++tile) {
    const T* const keys = first_stage + tile % stages * (2 * KEYS * WIDTH);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has landed for every thread, and none reads the other any more
    if (stages > 1 && tile + 1 < range.end) load_step();

    if (sight.any(start_m + warp_row, Tiles::kRowsPerWarp, tile * KEYS, KEYS)) {
      float products[SLICES][KEYS / 8][4] = {}, weight_gradients[SLICES][KEYS / 8][4] = {};
      multiply_rows<WIDTH, SLICES, KEYS>(products, queries, warp_row, keys);
      multiply_rows<WIDTH, SLICES, KEYS>(weight_gradients, gradients, warp_row, keys + KEYS * WIDTH);
      score_gradients<SLICES, KEYS>(products, weight_gradients, shifts, deltas, scores, sight, start_m + warp_row, tile * KEYS);
      accumulate_product<WIDTH, SLICES, KEYS>(sums, products, keys);
    }
    if (stages == 1 && tile + 1 < range.end) {
      __syncthreads();  // no thread reads the only stage any more
      load_step();
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
  const AttentionCall& call = backward.call;
  const Schedule schedule =
      make_schedule(call, call.seqlen_q, call.num_heads, call.num_heads / call.num_kv_heads, Tiles::kQueries);
  const int stages = choose_stages(Tiles::shared_bytes(1), Tiles::shared_bytes(2), device_limits());
  launch("attention_backward_dq_kernel", &attention_backward_dq_kernel<T, WIDTH, TERMS>, dim3(static_cast<unsigned>(schedule.num_blocks())),
         dim3(Tiles::kThreads), Tiles::shared_bytes(stages), stream, backward, schedule, stages);
}

template <class T, int WIDTH>
void attention_backward_dq_of_width(const AttentionBackward& backward, CUstream_st* stream) {
  if (backward.call.has_score_terms()) {
    launch_dq<T, WIDTH, true>(backward, stream);
  } else {
    launch_dq<T, WIDTH, false>(backward, stream);
  }
}

}  // namespace pytransformer
