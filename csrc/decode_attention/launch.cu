// Launch policy of decode attention, the merge of its splits, and the start of both kernels.
#include <algorithm>

#include "split.cuh"

namespace pytransformer {
namespace decode {
namespace {

// --- Policy ---------------------------------------------------------------------------------------------------------------------------
// Everything here depends on the sizes of a sequence and the position of a key, nothing else: the result for a sequence has the same bits
// whatever else is in the batch.

constexpr int kUnlimited = 1 << 30;  // more keys than a cache can hold, small enough to be added to in 32 bits

struct RowClass {
  int rows_up_to;
  SplitPlan splits;
};

constexpr RowClass kRowClasses[kMaxDecodeClasses] = {
    // One tile of rows. 256 keys of one head are 128 KB in 16 bits at head_dim 128: shorter splits write too many partial results (3 % of
    // the bytes here), longer ones leave SMs idle (batch 1 with 8 key heads and 4k keys gives 128 blocks). Beyond 8k keys there are enough.
    {kTileRows, {256, 32, 512}},
    // Some tens of rows: a partial result is as long as its rows are many, so splits are longer and fewer.
    {128, {1024, 8, 4096}},
    // More rows fill the GPU by themselves, and partial results would outgrow the cache.
    {kUnlimited, {kUnlimited, 1, kUnlimited}},
};

int warps_of(const DecodeAttention& call) {
  const int dim = call.head_dim > call.value_dim ? call.head_dim : call.value_dim;
  return dim <= 64 ? kWarps<64> : dim <= 128 ? kWarps<128> : kWarps<256>;
}

// Splits that cover `capacity` keys, at least 1.
int count_splits(const SplitPlan& plan, int capacity) {
  const int64_t fine_total = int64_t(plan.fine_keys) * plan.fine_splits;
  if (capacity <= fine_total) return std::max(1, ceil_div(capacity, plan.fine_keys));
  return plan.fine_splits + static_cast<int>(ceil_div<int64_t>(capacity - fine_total, plan.coarse_keys));
}

// `num_splits` equal splits of the whole cache, in whole steps of `step_keys`.
SplitPlan fixed_splits(int capacity, int num_splits, int step_keys) {
  num_splits = std::max(1, std::min(num_splits, ceil_div(capacity, step_keys)));  // also keeps key positions within 32 bits
  const int keys = std::max(1, ceil_div(ceil_div(capacity, num_splits), step_keys)) * step_keys;
  return {keys, num_splits, keys};
}

// --- Merge ----------------------------------------------------------------------------------------------------------------------------

constexpr int kCombineWarps = 4;  // a warp per row; four to a block, as blocks of one warp would leave an SM half empty

// Merges the splits of a row in ascending order; 4 features per lane and step, 128 bits.
template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize) decode_combine_kernel(const DecodeAttention call, const DecodeClass programs) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t index = int64_t(blockIdx.x) * kCombineWarps + threadIdx.x / kWarpSize;
  if (index >= int64_t(call.batch) * call.num_kv_heads * programs.rows) return;
  const int row = static_cast<int>(index % programs.rows);
  index /= programs.rows;
  const int kv_head = static_cast<int>(index % call.num_kv_heads), sequence_index = static_cast<int>(index / call.num_kv_heads);
  const Sequence sequence = sequence_of(call, sequence_index);
  const int num_rows = sequence.seqlen_q * call.group;
  if (num_rows <= programs.rows_above || num_rows > programs.rows_up_to || row >= num_rows) return;

  // The splits that the row's tile has written.
  const KeyRange range = tile_keys(call, sequence, row / programs.block_rows * programs.block_rows, programs.block_rows);
  const int first = range.low < range.high ? split_of(programs.splits, range.low) : 0;
  const int last = range.low < range.high ? split_of(programs.splits, range.high - 1) + 1 : 0;
  const int64_t place = index * programs.num_splits * programs.rows;
  const auto stats_of = [&](int split) { return programs.partial_stats + 2 * (place + int64_t(split) * programs.rows) + row; };

  RowStats total{-kInfinity, 0.0f};
  for (int split = first + lane; split < last; split += kWarpSize) total.max = fmaxf(total.max, stats_of(split)[0]);
  total.max = warp_reduce<kWarpSize>(total.max, Max{});
  const float shift = exponent_shift(total.max);
  float out[2][4] = {};
#pragma unroll 4
  for (int split = first; split < last; ++split) {
    const float* stats = stats_of(split);
    const float weight = exponential(stats[0] - shift);
    total.sum += weight * stats[programs.rows];
    const float* from = programs.partial_out + (place + int64_t(split) * programs.rows + row) * call.value_dim;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int feature = j * 128 + lane * 4;
      if (feature >= call.value_dim) continue;
      const float4 part = *reinterpret_cast<const float4*>(from + feature);
      out[j][0] += weight * part.x;
      out[j][1] += weight * part.y;
      out[j][2] += weight * part.z;
      out[j][3] += weight * part.w;
    }
  }
  const RowPlace at = place_of(call, kv_head, row);
  const RowEnd end = finish_row(call, total, at.head);
  const int token = sequence.first_token + at.token;
  T* to = static_cast<T*>(call.out) + out_offset(call, sequence_index, token, at.head);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int feature = j * 128 + lane * 4;
    if (feature >= call.value_dim) continue;
    *reinterpret_cast<uint2*>(to + feature) = uint2{ptx::pack<T>(out[j][0] * end.factor, out[j][1] * end.factor),
                                                   ptx::pack<T>(out[j][2] * end.factor, out[j][3] * end.factor)};
  }
  if (lane == 0) store_lse(call, sequence_index, token, at.head, end.lse);
}

template <class T>
void launch_combine(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  const int64_t rows = int64_t(call.batch) * call.num_kv_heads * programs.rows;
  launch("decode_combine_kernel", &decode_combine_kernel<T>, dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kCombineWarps))),
         dim3(kCombineWarps * kWarpSize), 0, stream, call, programs);
}

template <class T>
void run(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  if (call.cache_type == call.type) {
    launch_split<T, T>(call, programs, stream);
  } else {
    launch_split<T, int8_t>(call, programs, stream);
  }
  if (programs.num_splits > 1) launch_combine<T>(call, programs, stream);
}

}  // namespace
}  // namespace decode

int decode_classes(const DecodeAttention& call, int num_splits, DecodeClass (&classes)[kMaxDecodeClasses]) {
  using namespace decode;
  const int rows = call.seqlen_q * call.group, warps = warps_of(call);
  const bool packed = call.cu_seqlens_q != nullptr;
  int count = 0, above = 0;
  for (const RowClass& row_class : kRowClasses) {
    // A dense call has one class, packed sequences of up to `rows` rows may be of several.
    if (rows > above && (packed || rows <= row_class.rows_up_to)) {
      DecodeClass& programs = classes[count++] = {};
      programs.rows_above = above;
      programs.rows_up_to = row_class.rows_up_to;
      programs.block_rows = row_class.rows_up_to == kTileRows ? kTileRows : kTileRows * warps;
      programs.splits = num_splits > 0 ? fixed_splits(call.num_keys, num_splits, warps * kChunkKeys) : row_class.splits;
      programs.num_splits = count_splits(programs.splits, call.num_keys);
      programs.rows = std::min(rows, row_class.rows_up_to);
      programs.num_tiles = ceil_div(programs.rows, programs.block_rows);
    }
    above = row_class.rows_up_to;
  }
  return count;
}

void decode_attention(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  using namespace decode;
  if (call.type == ElementType::float16) {
    run<float16>(call, programs, stream);
  } else {
    run<bfloat16>(call, programs, stream);
  }
}

}  // namespace pytransformer
