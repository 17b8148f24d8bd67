// Launch policy of decode attention, and the start of its kernel.
#include <algorithm>
#include <limits>

#include "split.cuh"

namespace pytransformer {
namespace decode {
namespace {

// --- Policy ---------------------------------------------------------------------------------------------------------------------------
// How many splits a sequence has depends on its sizes, nothing else: its result has the same bits whatever else is in the batch.

constexpr int kUnlimited = 1 << 30;  // more rows than a call can have

// One sequence should fill a GPU by itself: so many blocks share its keys, over all key heads, as soon as it has that many steps of keys
// (64 keys a step: 1k keys with 8 key heads). More would only write more partial results: each task leaves at most as many as it has
// splits, and scratch is bounded by the splits that the blocks of a launch can begin. With more rows a partial result is longer, and a GPU
// sooner full; more than 128 fill it by themselves.
struct RowClass {
  int rows_up_to, programs_of_a_sequence, least_splits, most_splits;
};

constexpr RowClass kRowClasses[kMaxDecodeClasses] = {{kTileRows, 128, 8, 64}, {128, 64, 4, 16}, {kUnlimited, 1, 1, 1}};

// As many blocks as an SM holds beside each other with 128 features in 16 bits.
constexpr int kProgramsPerSm = 2;

int warps_of(const DecodeAttention& call) {
  const int dim = call.head_dim > call.value_dim ? call.head_dim : call.value_dim;
  return dim <= 64 ? kWarps<64> : dim <= 128 ? kWarps<128> : kWarps<256>;
}

template <class T>
void run(const DecodeAttention& call, const DecodeClass& programs, CUstream_st* stream) {
  if (call.cache_type == call.type) {
    launch_decode<T, T>(call, programs, stream);
  } else {
    launch_decode<T, int8_t>(call, programs, stream);
  }
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
      const int of_policy = std::max(row_class.least_splits, std::min(row_class.most_splits, row_class.programs_of_a_sequence / call.num_kv_heads));
      // No more than the cache has steps, which leaves every sequence the splits it has.
      const int steps = ceil_div(call.num_keys, warps * kChunkKeys);
      programs.max_splits = std::max(1, std::min(num_splits > 0 ? num_splits : of_policy, steps));
      const int class_rows = std::min(rows, row_class.rows_up_to);
      programs.rows = std::min(class_rows, programs.block_rows);
      programs.num_tiles = ceil_div(class_rows, programs.block_rows);
      const int64_t tasks = int64_t(call.batch) * call.num_kv_heads * programs.num_tiles;
      const int64_t most = int64_t(kProgramsPerSm) * device_limits().num_sms;
      programs.num_programs = static_cast<int>(
          std::min<int64_t>(programs.max_splits == 1 ? tasks : std::min(tasks * programs.max_splits, most), std::numeric_limits<int>::max()));
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
