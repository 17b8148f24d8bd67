#include "launch_error.h"

#include <string>

#include "build_info.h"

namespace pytransformer {
namespace {

std::string text(Sizes sizes) {
  return std::to_string(sizes.x) + "x" + std::to_string(sizes.y) + "x" + std::to_string(sizes.z);
}

// Values of cudaError_t that have a remedy; this file is compiled without CUDA's headers.
std::string remedy(int error) {
  switch (error) {
    case 35:   // cudaErrorInsufficientDriver
    case 222:  // cudaErrorUnsupportedPtxVersion
      return std::string("; the NVIDIA driver is too old for a binary built with CUDA ") + kCudaVersion +
             " (CUDA 13 needs driver 580 or newer): update the driver, or rebuild with an older CUDA toolkit";
    case 98:   // cudaErrorInvalidDeviceFunction
    case 209:  // cudaErrorNoKernelImageForDevice
      return std::string("; this binary was built for ") + kArchitectures +
             ", which leaves this GPU out: rebuild with PYTRANSFORMER_CUDA_ARCHS set to its compute capability";
    case 2:  // cudaErrorMemoryAllocation
      return "; the GPU is out of memory";
    default:
      return "";
  }
}

}  // namespace

void throw_launch_error(const char* kernel, Sizes grid, Sizes block, size_t shared_bytes, int error, const char* reason) {
  throw LaunchError(std::string(kernel) + ": launch failed: " + reason + " (grid " + text(grid) + ", block " + text(block) + ", " +
                    std::to_string(shared_bytes) + " bytes of dynamic shared memory)" + remedy(error));
}

void throw_runtime_error(const char* call, int error, const char* reason) {
  throw LaunchError(std::string(call) + " failed: " + reason + remedy(error));
}

}  // namespace pytransformer
