// The one header that knows who compiles a kernel: nvcc for a GPU, or g++ for the host emulator (tests/cuda_emulator).
//
// Kernels are started by launch(), take dynamic shared memory through PYT_DYNAMIC_SHARED, and use inline PTX only through ptx.cuh.
#pragma once

#include <cstdint>
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

#ifdef __CUDACC__

// Limits of the current device; asked of the driver once per device.
inline DeviceLimits device_limits() {
  constexpr int kMaxDevices = 64;
  static DeviceLimits known[kMaxDevices] = {};
  int device = 0;
  cudaGetDevice(&device);
  DeviceLimits limits = device < kMaxDevices ? known[device] : DeviceLimits{};
  if (limits.num_sms == 0) {
    cudaDeviceGetAttribute(&limits.num_sms, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (device < kMaxDevices) known[device] = limits;
  }
  return limits;
}

// Starts `kernel` on `stream`; throws LaunchError with the kernel's name and the sizes where CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutOptIn) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it: the next launch must not be blamed
    throw_launch_error(name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, static_cast<int>(error),
                       cudaGetErrorString(error));
  }
}

#else

inline DeviceLimits device_limits() { return {emulator::options().num_sms, emulator::options().shared_memory}; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  emulator::launch(name, kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
}

#endif

template <class Integer>
constexpr Integer ceil_div(Integer numerator, Integer denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace pytransformer
