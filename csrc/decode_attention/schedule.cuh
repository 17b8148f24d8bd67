// Who computes what: the splits of a sequence's keys, and the stretch of all work that a block takes.
//
// The splits of a sequence follow from its own length, rows and window alone. Which block computes a split changes nothing in a result, so
// that this may depend on the whole batch: the work of all sequences, in steps of keys, is laid out in a row and cut into one stretch for
// each block. A block computes the splits that begin in its stretch. It finds the sequences there from their lengths, on the device.
//
// A task is one tile of query rows of one key head of one sequence. The block in whose stretch a task begins lends its scratch and its
// counter to those that share the task. It begins many, but only the last one can reach into another block's stretch.
#pragma once

#include "extent.cuh"

namespace pytransformer::decode {

// What some row of a sequence sees, in steps of keys.
struct Steps {
  int first, count;
  int splits;  // at least one
};

__device__ __forceinline__ Steps steps_of(const DecodeAttention& call, const DecodeClass& programs, const Sequence& sequence, int step_keys) {
  const KeyRange range = visible_keys(call, sequence, 0, sequence.seqlen_q - 1);
  const int first = range.low / step_keys, count = max(ceil_div(max(range.high, 0), step_keys) - first, 0);
  return {first, count, max(min(count, programs.max_splits), 1)};
}

// The step at which a split begins: splits are as equal as whole steps allow, and the first ones are the longer ones.
__device__ __forceinline__ int split_start(const Steps& steps, int split) {
  return split * (steps.count / steps.splits) + min(split, steps.count % steps.splits);
}

// The first split that begins at `step` or later; `splits` if there is none.
__device__ __forceinline__ int first_split_from(const Steps& steps, int64_t step) {
  const int at = static_cast<int>(max(min(step, int64_t(steps.count + 1)), int64_t(0)));
  const int shorter = steps.count / steps.splits, longer = steps.count % steps.splits;
  const int beyond = at - longer * (shorter + 1);
  const int split = beyond <= 0 ? ceil_div(at, shorter + 1) : longer + ceil_div(beyond, max(shorter, 1));
  return min(split, steps.splits);
}

// Tiles of query rows of a sequence; none if its rows are for another launch.
__device__ __forceinline__ int tiles_of(const DecodeAttention& call, const DecodeClass& programs, const Sequence& sequence) {
  const int rows = sequence.seqlen_q * call.group;
  return rows > programs.rows_above && rows <= programs.rows_up_to ? ceil_div(rows, programs.block_rows) : 0;
}

// The work of a sequence: of each task its steps, and one for what it costs beside them. 0 behind the last sequence.
__device__ __forceinline__ int64_t work_of(const DecodeAttention& call, const DecodeClass& programs, int index, int step_keys) {
  if (index >= call.batch) return 0;
  const Sequence sequence = sequence_of(call, index);
  const int64_t tasks = int64_t(tiles_of(call, programs, sequence)) * call.num_kv_heads;
  return tasks * (steps_of(call, programs, sequence, step_keys).count + 1);
}

struct Stretch {
  int64_t begin, end;  // of the block's part of all work
  int64_t total;
  int sequence;   // at its begin
  int64_t place;  // where that one's work begins
};

// Every warp finds the same.
__device__ __forceinline__ Stretch stretch_of(const DecodeAttention& call, const DecodeClass& programs, int step_keys) {
  const int lane = threadIdx.x % kWarpSize;
  Stretch stretch{};
  for (int first = 0; first < call.batch; first += kWarpSize) stretch.total += work_of(call, programs, first + lane, step_keys);
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) stretch.total += __shfl_xor_sync(kFullWarp, stretch.total, offset);
  stretch.begin = int64_t(blockIdx.x) * stretch.total / programs.num_programs;
  stretch.end = int64_t(blockIdx.x + 1) * stretch.total / programs.num_programs;
  for (int first = 0; first < call.batch; first += kWarpSize) {
    int64_t through = work_of(call, programs, first + lane, step_keys);  // the work up to and with this lane's sequence
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int64_t before = __shfl_up_sync(kFullWarp, through, offset);
      if (lane >= offset) through += before;
    }
    const bool passed = first + lane < call.batch && stretch.place + through <= stretch.begin;
    const int count = __popc(__ballot_sync(kFullWarp, passed));
    stretch.sequence += count;
    const int64_t work = __shfl_sync(kFullWarp, through, max(count - 1, 0));
    if (count > 0) stretch.place += work;
    if (count < kWarpSize) break;
  }
  return stretch;
}

// The block in whose stretch a place in the row of all work lies.
__device__ __forceinline__ int program_at(const DecodeClass& programs, const Stretch& stretch, int64_t place) {
  return static_cast<int>(((place + 1) * programs.num_programs - 1) / stretch.total);
}

}  // namespace pytransformer::decode
