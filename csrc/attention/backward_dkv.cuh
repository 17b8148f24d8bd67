// dK and dV: a block owns a tile of keys and values and walks over the queries that see them, in every head of its group.
//
// Scores are formed transposed (keys x queries): their accumulators are, as they are, the left operand of dV = Pᵀ dO and dK = dSᵀ Q. Warps work
// in pairs on the same keys. One of a pair forms S = K Qᵀ and owns rows of dV, the other forms dP = V dOᵀ and owns those of dK; the weights
// pass from the first to the second through shared memory. So a warp holds one accumulator in place of two, and every row of Q and dO that
// it reads serves twice as many keys.
#pragma once

#include "backward_tile.cuh"

namespace pytransformer {

// Sizes that are compiled in.
template <int WIDTH>
struct KeyTiles {
  static constexpr int kSlices = WIDTH <= 128 ? 2 : 1;  // of 16 keys: a warp's sums are 16 · kSlices · WIDTH, at most 128 registers
  static constexpr int kKeysPerPair = 16 * kSlices;
  static constexpr int kPairs = WIDTH <= 128 ? 4 : 2;
  static constexpr int kKeys = kPairs * kKeysPerPair;
  static constexpr int kThreads = kPairs * 2 * kWarpSize;
  static constexpr int kQueries = 32;  // visited at a time

  // Bytes of shared memory: keys and values, weights that pass, and stages of queries, their dO and two statistics of each.
  static constexpr int kPassing = kKeys * kQueries * 4;
  static constexpr int kStage = 2 * kQueries * WIDTH * 2 + 2 * kQueries * 4;
  static constexpr int shared_bytes(int stages) { return 2 * kKeys * WIDTH * 2 + kPassing + stages * kStage; }
};

// What a pair's first warp makes of its products: weights, and for the second warp the weights times softcap's slope.
template <int SLICES, int QUERIES, bool TERMS, bool MASKED, bool SOFTCAP>
__device__ __forceinline__ void weigh_transposed(float (&products)[SLICES][QUERIES / 8][4], float4* passing, const float* shifts,
                                                 const Scores<TERMS>& scores, const Sight& sight, int32_t start_m, int32_t start_n) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
    const int32_t key = start_n + m * 16 + lane / 4;
    const PositionRange seeing[2] = {sight.queries_of(key), sight.queries_of(key + 8)};
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float2 shift = *reinterpret_cast<const float2*>(shifts + column);
      float(&weights)[4] = products[m][n];
      float slopes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t query = start_m + column + i % 2;
        const float weight = weight_of<TERMS, SOFTCAP>(weights[i], i % 2 ? shift.y : shift.x, sight.distance(query, key + i / 2 * 8), scores,
                                                       slopes[i]);
        weights[i] = !MASKED || seeing[i / 2].has(query) ? weight : 0.0f;
      }
      passing[(m * (QUERIES / 8) + n) * kWarpSize] =
          make_float4(weights[0] * slopes[0], weights[1] * slopes[1], weights[2] * slopes[2], weights[3] * slopes[3]);
    }
  }
}

// What the second warp makes of its products: dS = P ∘ (dP - delta).
template <int SLICES, int QUERIES>
__device__ __forceinline__ void transposed_score_gradients(float (&products)[SLICES][QUERIES / 8][4], const float4* passing,
                                                           const float* deltas) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < SLICES; ++m) {
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
      const float4 weights = passing[(m * (QUERIES / 8) + n) * kWarpSize];
      const float2 delta = *reinterpret_cast<const float2*>(deltas + n * 8 + lane % 4 * 2);
      float(&gradients)[4] = products[m][n];
      gradients[0] = weights.x * (gradients[0] - delta.x);
      gradients[1] = weights.y * (gradients[1] - delta.y);
      gradients[2] = weights.z * (gradients[2] - delta.x);
      gradients[3] = weights.w * (gradients[3] - delta.y);
    }
  }
}

template <class T, int WIDTH, bool TERMS>
__global__ void __launch_bounds__(KeyTiles<WIDTH>::kThreads, 1)
    attention_backward_dkv_kernel(const AttentionBackward backward, Schedule schedule, int stages) {
  using Tiles = KeyTiles<WIDTH>;
  constexpr int SLICES = Tiles::kSlices, KEYS = Tiles::kKeys, QUERIES = Tiles::kQueries, THREADS = Tiles::kThreads;
  const AttentionCall& call = backward.call;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, pair = warp % Tiles::kPairs;
  const bool owns_dk = warp >= Tiles::kPairs;

  const Place place = find_place<KEYS>(tile_and_slot(schedule, false), call.batch, call.num_kv_heads, call.cu_seqlens_k, call.seqlen_k,
                                       call.cu_seqlens_q, call.seqlen_q);
  const int32_t start_n = place.start, warp_row = pair * Tiles::kKeysPerPair, group = call.num_heads / call.num_kv_heads;
  if (start_n >= place.length) return;
  const Sight sight{place.other_length, place.length, call.window_left, call.window_right};
  const int32_t diagonal = place.other_length - place.length;
  const TileRange range = tile_range(start_n, min(start_n + KEYS, place.length) - 1, diagonal - call.window_right,
                                     diagonal + call.window_left, place.other_length, QUERIES);

  PYT_DYNAMIC_SHARED(shared);
  T* const keys = reinterpret_cast<T*>(shared);
  T* const values = keys + KEYS * WIDTH;
  auto* const passing = reinterpret_cast<float4*>(values + KEYS * WIDTH) + pair * (SLICES * QUERIES / 8 * kWarpSize) + lane;
  unsigned char* const first_stage = reinterpret_cast<unsigned char*>(values + KEYS * WIDTH) + Tiles::kPassing;

  // Starts loading the queries, dO and statistics of a step. Steps go through the tiles of one head, then through those of the next.
  const int32_t num_steps = (range.end - range.begin) * group;
  int32_t loaded = 0, loaded_tile = range.begin, loaded_head = place.head * group;
  const auto load_step = [&] {
    T* const queries = reinterpret_cast<T*>(first_stage + (loaded & (stages - 1)) * Tiles::kStage);
    T* const gradients = queries + QUERIES * WIDTH;
    auto* const statistics = reinterpret_cast<float*>(gradients + QUERIES * WIDTH);
    const int32_t start_m = loaded_tile * QUERIES, rows_left = place.other_length - start_m;
    load_tile_async<QUERIES, WIDTH, THREADS>(
        queries, row_address(static_cast<const T*>(call.q), call.stride_q, place.sequence, place.other_first, start_m, loaded_head),
        call.stride_q.row, rows_left, call.head_dim);
    load_tile_async<QUERIES, WIDTH, THREADS>(
        gradients,
        row_address(static_cast<const T*>(backward.dout), backward.stride_dout, place.sequence, place.other_first, start_m, loaded_head),
        backward.stride_dout.row, rows_left, call.value_dim);
    if (threadIdx.x < 2 * QUERIES) {
      const int row = threadIdx.x % QUERIES;
      const float* source = backward.workspace + (threadIdx.x < QUERIES ? 0 : num_statistics(call));
      source += statistic_index(call, place.sequence, place.other_first, loaded_head) + start_m;
      ptx::cp_async<4>(statistics + threadIdx.x, row < rows_left ? source + row : source, row < rows_left);
    }
    ptx::cp_async_commit();
    ++loaded;
    if (++loaded_tile == range.end) {
      loaded_tile = range.begin;
      ++loaded_head;
    }
  };

  if (num_steps > 0) {
    load_tile_async<KEYS, WIDTH, THREADS>(
        keys, row_address(static_cast<const T*>(call.k), call.stride_k, place.sequence, place.first, start_n, place.head), call.stride_k.row,
        place.length - start_n, call.head_dim);
    load_tile_async<KEYS, WIDTH, THREADS>(
        values, row_address(static_cast<const T*>(call.v), call.stride_v, place.sequence, place.first, start_n, place.head),
        call.stride_v.row, place.length - start_n, call.value_dim);
    load_step();
  }
  T* const own_tile = owns_dk ? values : keys;  // left operand of the first product
  float sums[SLICES][WIDTH / 8][4] = {};
  int32_t tile = range.begin, head = place.head * group;
  for (int32_t step = 0; step < num_steps; ++step) {
    const T* const queries = reinterpret_cast<const T*>(first_stage + (step & (stages - 1)) * Tiles::kStage);
    const T* const gradients = queries + QUERIES * WIDTH;
    const auto* const statistics = reinterpret_cast<const float*>(gradients + QUERIES * WIDTH);
    if (stages == 1 && step > 0) {
      __syncthreads();  // no thread reads the only stage any more
      load_step();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has landed for every thread, and none reads the other any more
    if (stages > 1 && step + 1 < num_steps) load_step();

    const bool meets = sight.any(tile * QUERIES, QUERIES, start_n + warp_row, Tiles::kKeysPerPair);
    float products[SLICES][QUERIES / 8][4] = {};
    if (meets) {
      multiply_rows<WIDTH, SLICES, QUERIES>(products, own_tile, warp_row, owns_dk ? gradients : queries);
      if (!owns_dk) {
        const Scores<TERMS> scores(call, place.sequence, head);
        with_constants<TERMS>(!sight.all(tile * QUERIES, QUERIES, start_n + warp_row, Tiles::kKeysPerPair), scores.has_softcap,
                              [&](auto masked, auto softcap) {
                                weigh_transposed<SLICES, QUERIES, TERMS, masked.value, softcap.value>(
                                    products, passing, statistics, scores, sight, tile * QUERIES, start_n + warp_row);
                              });
      }
    }
    __syncthreads();  // the weights have passed
    if (meets) {
      if (owns_dk) transposed_score_gradients<SLICES, QUERIES>(products, passing, statistics + QUERIES);
      accumulate_product<WIDTH, SLICES, QUERIES>(sums, products, owns_dk ? queries : gradients);
    }
    if (++tile == range.end) {
      tile = range.begin;
      ++head;
    }
  }

  const int32_t cols = owns_dk ? call.head_dim : call.value_dim;
  const RowStrides strides = contiguous_strides(call.is_packed(), call.seqlen_k, call.num_kv_heads, cols);
  T* const result = static_cast<T*>(owns_dk ? backward.dk : backward.dv);
  write_sums<WIDTH, SLICES>(row_address(result, strides, place.sequence, place.first, start_n + warp_row, place.head), strides.row,
                          place.length - start_n - warp_row, cols, sums, owns_dk ? call.softmax_scale : 1.0f, own_tile, warp_row);
}

template <class T, int WIDTH, bool TERMS>
void launch_dkv(const AttentionBackward& backward, CUstream_st* stream) {
  using Tiles = KeyTiles<WIDTH>;
  static_assert(Tiles::shared_bytes(1) <= kLeastSharedMemory);
  const AttentionCall& call = backward.call;
  Schedule schedule = make_schedule(call, call.seqlen_k, call.num_kv_heads, 1, Tiles::kKeys);
  // What the blocks share here is the queries, of which a key head has a group.
  schedule.slots_per_group = max(1, schedule.slots_per_group / (call.num_heads / call.num_kv_heads));
  const int stages = choose_stages(Tiles::shared_bytes(1), Tiles::shared_bytes(2), device_limits());
  launch("attention_backward_dkv_kernel", &attention_backward_dkv_kernel<T, WIDTH, TERMS>,
         dim3(static_cast<unsigned>(schedule.num_blocks())), dim3(Tiles::kThreads), Tiles::shared_bytes(stages), stream, backward, schedule,
         stages);
}

}  // namespace pytransformer
