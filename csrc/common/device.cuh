// The one header that knows who compiles a kernel: nvcc for a GPU, or g++ for the host emulator (tests/cuda_emulator).
//
// Kernels are started by launch(), take dynamic shared memory through PYT_DYNAMIC_SHARED, and use inline PTX only through ptx.cuh.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch_error.h"

// Dynamic shared memory of the block, 128-byte aligned (what TMA and swizzled ldmatrix tiles may ask for).
#define PYT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "cuda_emulator.h"
#define PYT_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()
#endif

namespace pytransformer {

// What launch policy may depend on.
struct DeviceLimits {
  int num_sms;
  int shared_memory;  // largest dynamic shared memory of a block, bytes
};

// The calls of CUDA's runtime that a launch makes; the emulator has its own.
namespace runtime {

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next launch must not be blamed
  throw_runtime_error(call, static_cast<int>(error), cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline DeviceLimits limits_of(int device) {
  DeviceLimits limits{};
  check(cudaDeviceGetAttribute(&limits.num_sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return limits;
}

// A launch of a kernel, as its error names it.
struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw_launch_error(name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, static_cast<int>(error),
                       cudaGetErrorString(error));
  }

  void allow_shared_memory(const void* kernel) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }

  template <class... Parameters, class... Arguments>
  void start(void (*kernel)(Parameters...), cudaStream_t stream, Arguments&&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }
};

#else

using emulator::current_device;

inline DeviceLimits limits_of(int device) {
  const emulator::Device& found = emulator::limits_of(device);
  return {found.num_sms, found.shared_memory};
}

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;

  void allow_shared_memory(const void* kernel) const { emulator::allow_shared_memory(name, kernel, shared_bytes); }

  template <class... Parameters, class... Arguments>
  void start(void (*kernel)(Parameters...), cudaStream_t, Arguments&&... arguments) const {
    emulator::launch(name, kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
  }
};

#endif

}  // namespace runtime

// Limits of the current device. The runtime is asked once for each device, by whichever thread comes first.
inline DeviceLimits device_limits() {
  constexpr int kMaxDevices = 64;
  static std::mutex mutex;
  static DeviceLimits limits[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  const int device = runtime::current_device();
  if (device >= kMaxDevices) return runtime::limits_of(device);
  if (!known[device].load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex);
    if (!known[device].load(std::memory_order_relaxed)) limits[device] = runtime::limits_of(device);
    known[device].store(true, std::memory_order_release);
  }
  return limits[device];
}

// Lets the blocks of a kernel have the dynamic shared memory of a launch. The runtime is told only if that is more than the kernel had on
// this device so far.
inline void allow_shared_memory(const runtime::Launch& launch, const void* kernel) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  if (launch.shared_bytes <= kWithoutOptIn) return;
  const int device = runtime::current_device();
  const std::lock_guard lock(mutex);  // held until the runtime knows: of two threads the one that asks for less must not come last
  size_t& most = allowed[{kernel, device}];
  if (launch.shared_bytes <= most) return;
  launch.allow_shared_memory(kernel);
  most = launch.shared_bytes;
}

// Starts `kernel` on `stream`; throws LaunchError with the kernel's name and the sizes where CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  const runtime::Launch launch{name, grid, block, shared_bytes};
  allow_shared_memory(launch, reinterpret_cast<const void*>(kernel));
  launch.start(kernel, stream, std::forward<Arguments>(arguments)...);
}

template <class Integer>
constexpr Integer ceil_div(Integer numerator, Integer denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace pytransformer
