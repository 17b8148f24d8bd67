// The emulated block: its threads, its barriers, and what the scheduler knows about them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

inline constexpr int kMaxWarps = kMaxThreads / 32;

// A cp.async that has been issued and whose data has not landed.
struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* tsan_fiber = nullptr;
  bool started = false;
  uint3 thread_index{};
  // What it waits for, and where in the kernel.
  const char* waits_in = "";
  Location location;
  unsigned warp_mask = 0;
  void* exchange = nullptr;
  void (*operation)(void**, unsigned) = nullptr;
  // Its asynchronous copies.
  std::vector<AsyncCopy> copies;
  int committed_groups = 0;
};

// The lanes of a warp, a bit each, by what they are about; a lane in none of them runs.
struct Warp {
  uint32_t ready = 0, at_block_barrier = 0, at_warp_barrier = 0;
  uint32_t ended = 0;  // and lanes that the block does not have
};

struct BlockBarrier {
  int arrived = 0;
  unsigned generation = 0;
  Location location;
  char order[2] = {};  // addresses for the sanitizer, alternating so that a fast thread cannot meet the next use
};

struct State {
  Fiber fibers[kMaxThreads];
  Fiber host;
  Warp warps[kMaxWarps];
  BlockBarrier barrier;
  int warp_order[kMaxWarps] = {};
  int num_threads = 0, num_warps = 0, num_ended = 0;
  uint64_t random = 1;
  char* stacks = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool failed = false;
  std::string error;
  char block_starts = 0, block_ends = 0;  // addresses for the sanitizer
};

static State& state = *new State;

static uint32_t random_bits() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return static_cast<uint32_t>(state.random >> 11);
}

static std::string text(const Location& location) {
  const std::string file = location.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(location.line());
}

static std::string thread_name(int thread) {
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

}  // namespace emulator
