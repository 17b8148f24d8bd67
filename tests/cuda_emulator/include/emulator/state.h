// What kernels and tests see of the emulated GPU: CUDA's index variables, the settings, and the calls into the emulator itself, which is
// compiled once (runtime/emulator.cpp).
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
inline constexpr int kMaxGridYZ = 65535;
inline constexpr int kMostSharedMemory = 232448;  // of a block: sm_90's limit

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

// The thread that runs, counted within its block; -1: the host.
inline int current_thread = -1;
// The block's dynamic shared memory.
inline unsigned char* shared_memory = nullptr;

inline unsigned char* dynamic_shared() { return shared_memory; }
inline int lane() { return current_thread % 32; }

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& message);

// Runs body(argument) in every thread of a grid.
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void* argument, void (*body)(void*));

// All threads of the block meet.
void block_barrier(const char* what, const Location& location);

// The lanes named in `mask` meet, and all see what the others did before.
void warp_barrier(unsigned mask, const Location& location);

// The lanes named in `mask` meet; the last to arrive runs `operation` on the exchange records of all.
void warp_collective(unsigned mask, void* exchange, void (*operation)(void**, unsigned), const char* what, const Location& location);

}  // namespace emulator
