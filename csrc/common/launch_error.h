// What a failed launch says: the kernel, its sizes, and what to do where the cause is known. The same for a question to the runtime.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace pytransformer {

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Sizes {
  unsigned x, y, z;
};

[[noreturn]] void throw_launch_error(const char* kernel, Sizes grid, Sizes block, size_t shared_bytes, int error, const char* reason);
[[noreturn]] void throw_runtime_error(const char* call, int error, const char* reason);

}  // namespace pytransformer
