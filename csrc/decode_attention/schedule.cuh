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

// Where no sequence has a second split there is one block for each task, and its sequence is the block's stretch.
__device__ __forceinline__ Stretch stretch_of_one_task(const DecodeAttention& call, const DecodeClass& programs) {
  return {0, 1, 1, static_cast<int>(blockIdx.x) / (call.num_kv_heads * programs.num_tiles), 0};
}

// The block in whose stretch a place in the row of all work lies.
__device__ __forceinline__ int program_at(const DecodeClass& programs, const Stretch& stretch, int64_t place) {
  return static_cast<int>(((place + 1) * programs.num_programs - 1) / stretch.total);
}

// What a block works on at a time.
struct Program {
  int kv_head, sequence, tile;
};

// What a block does of a task.
struct Share {
  int first_split, end_split;
  int splits;  // of the task
  int owner;   // the block that lends its scratch and its counter

  __device__ __forceinline__ bool is_whole() const { return end_split - first_split == splits; }
};

// What a block has to do: its stretch from the sequence in work on, of that one the task in work, and of that one the split.
struct Work {
  Stretch stretch;
  int64_t task, end_task;  // of the sequence; the last of them is behind the stretch, or behind the sequence
  int64_t tasks;           // of the sequence
  int tiles;
  Steps steps;
  Program program;
  Share share;
  int split;
  bool has_split;  // whether anything is left

  __device__ __forceinline__ bool is_last_of_share() const { return split + 1 == share.end_split; }
};

// Begins the sequence that the stretch is at, if one is left.
__device__ __forceinline__ void begin_sequence(const DecodeAttention& call, const DecodeClass& programs, Work& work, int step_keys) {
  const Stretch& stretch = work.stretch;
  work.has_split = stretch.place < stretch.end;
  if (!work.has_split) return;
  const Sequence sequence = sequence_of(call, stretch.sequence);
  work.steps = steps_of(call, programs, sequence, step_keys);
  work.tiles = tiles_of(call, programs, sequence);
  work.tasks = int64_t(work.tiles) * call.num_kv_heads;
  if (programs.scratch == nullptr) {
    work.task = blockIdx.x % (call.num_kv_heads * programs.num_tiles);
    work.end_task = min(work.task + 1, work.tasks);
  } else {
    const int64_t size = work.steps.count + 1;
    work.task = max(stretch.begin - stretch.place, int64_t(0)) / size;
    work.end_task = min(ceil_div<int64_t>(stretch.end - stretch.place, size), work.tasks);
  }
}

// The block's share of the task in work.
__device__ __forceinline__ void begin_task(const DecodeAttention& call, const DecodeClass& programs, Work& work) {
  // Neighbours in memory run together; of causal tiles the last one is the longest.
  work.program = {static_cast<int>(work.task % call.num_kv_heads), work.stretch.sequence,
                  work.tiles - 1 - static_cast<int>(work.task / call.num_kv_heads)};
  work.share = {0, 1, 1, 0};
  if (programs.scratch != nullptr) {
    const int64_t place = work.stretch.place + work.task * (work.steps.count + 1);
    work.share = {first_split_from(work.steps, work.stretch.begin - place), first_split_from(work.steps, work.stretch.end - place),
                  work.steps.splits, program_at(programs, work.stretch, place)};
  }
  work.split = work.share.first_split;
}

// Goes on to a task in which splits are the block's, in this sequence or a later one.
__device__ __forceinline__ void find_task(const DecodeAttention& call, const DecodeClass& programs, Work& work, int step_keys) {
  while (work.has_split) {
    if (work.task < work.end_task) {
      begin_task(call, programs, work);
      if (work.split < work.share.end_split) return;
      ++work.task;
    } else {
      work.stretch.place = programs.scratch == nullptr ? work.stretch.end : work.stretch.place + work.tasks * (work.steps.count + 1);
      ++work.stretch.sequence;
      begin_sequence(call, programs, work, step_keys);
    }
  }
}

__device__ __forceinline__ void begin_work(const DecodeAttention& call, const DecodeClass& programs, Work& work, const Stretch& stretch,
                                           int step_keys) {
  work.stretch = stretch;
  begin_sequence(call, programs, work, step_keys);
  find_task(call, programs, work, step_keys);
}

__device__ __forceinline__ void next_split(const DecodeAttention& call, const DecodeClass& programs, Work& work, int step_keys) {
  if (++work.split < work.share.end_split) return;
  ++work.task;
  find_task(call, programs, work, step_keys);
}

}  // namespace pytransformer::decode
