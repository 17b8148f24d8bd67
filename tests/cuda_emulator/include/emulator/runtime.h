// The calls of CUDA's runtime that a launch makes on the host: of several devices, one for each choice of sizes, and counted.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace emulator {

inline constexpr size_t kWithoutOptIn = 48 * 1024;  // so much dynamic shared memory any kernel may have

// How often the runtime was asked.
struct RuntimeCalls {
  std::atomic<int> limits{0};      // what a device is like
  std::atomic<int> allowances{0};  // that a kernel may have more dynamic shared memory
};

inline RuntimeCalls runtime_calls;

inline int current_device() { return options().device; }

inline const Device& limits_of(int device) {
  ++runtime_calls.limits;
  return devices().at(device);
}

inline void check_shared_memory(const char* name, size_t bytes) {
  const int most = devices().at(current_device()).shared_memory;
  if (bytes > static_cast<size_t>(most)) {
    throw Error(std::string(name) + ": " + std::to_string(bytes) + " bytes of dynamic shared memory, and a block may have " +
                std::to_string(most) + " on this device");
  }
}

// What kernels may have on each device, beyond what all may.
class Allowances {
 public:
  void set(const void* kernel, int device, size_t bytes) {
    const std::lock_guard lock(mutex_);
    allowed_[{kernel, device}] = bytes;
  }

  size_t get(const void* kernel, int device) {
    const std::lock_guard lock(mutex_);
    const auto found = allowed_.find({kernel, device});
    return found == allowed_.end() ? kWithoutOptIn : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> allowed_;
};

inline Allowances& allowances() {
  static Allowances known;
  return known;
}

// As CUDA's, this replaces what was allowed before, be it more.
inline void allow_shared_memory(const char* name, const void* kernel, size_t bytes) {
  ++runtime_calls.allowances;
  check_shared_memory(name, bytes);
  allowances().set(kernel, current_device(), bytes);
}

}  // namespace emulator
