// The emulated block: its threads, its barriers, and what the scheduler knows about them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

using Location = std::source_location;

// A fault of the kernel that the emulator found itself.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxBarriers = 16;
inline constexpr int kMaxGridYZ = 65535;
inline constexpr int kMostSharedMemory = 232448;  // of a block: sm_90's limit
inline constexpr size_t kStackBytes = 256 * 1024;

struct Options {
  int schedule = 0;            // 0: threads and blocks in order; 1: in reverse; more: a random order seeded by the number
  bool stub_launches = false;  // launches return at once: for measuring the host's share of a call
  int device = 0;              // the current one, of devices()
};

// What launch policy is told of a device.
struct Device {
  int num_sms = 4;
  int shared_memory = kMostSharedMemory;  // what a block may have of it

  bool operator==(const Device&) const = default;
};

// Other sizes are another device, as what is known of one is kept.
inline std::vector<Device>& devices() {
  static std::vector<Device> known(1);
  return known;
}

inline int find_device(const Device& wanted) {
  const auto found = std::find(devices().begin(), devices().end(), wanted);
  const auto index = found - devices().begin();
  if (found == devices().end()) devices().push_back(wanted);
  return static_cast<int>(index);
}

inline Options& options() {
  static Options chosen;
  return chosen;
}

enum class Status : uint8_t { ready, at_block_barrier, at_warp_barrier, done };

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
  char* stack = nullptr;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  bool started = false;
  Status status = Status::done;
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

struct Barrier {
  int arrived = 0;
  int expected = 0;
  unsigned generation = 0;
  Location location;
  uint32_t waiting[kMaxThreads / 32] = {};
  char order[2] = {};  // addresses for the sanitizer, alternating so that a fast thread cannot meet the next use
};

struct State {
  Fiber fibers[kMaxThreads];
  Fiber main;
  Barrier barriers[kMaxBarriers];
  uint32_t ready[kMaxThreads / 32] = {};
  int warp_order[kMaxThreads / 32] = {};
  int num_threads = 0, num_warps = 0, num_done = 0;
  int current = -1;  // thread that runs; -1: the host
  uint64_t random = 1;
  unsigned char* shared = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool failed = false;
  std::string error;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  char block_starts = 0, block_ends = 0;  // addresses for the sanitizer
};

inline State& state = *new State;

inline unsigned char* dynamic_shared() { return state.shared; }
inline int lane() { return state.current % 32; }

EMULATOR_RUNTIME inline uint32_t random_bits() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return static_cast<uint32_t>(state.random >> 11);
}

EMULATOR_RUNTIME inline std::string text(const Location& location) {
  const std::string file = location.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(location.line());
}

EMULATOR_RUNTIME inline std::string thread_name(int thread) {
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

}  // namespace emulator
