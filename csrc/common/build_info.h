// Facts about this binary; the build passes them as macros to build_info.cpp.
#pragma once

namespace pytransformer {

extern const char* const kVersion;        // version of the Python package
extern const char* const kSourceId;       // hash of csrc/
extern const char* const kArchitectures;  // e.g. "sm_80 sm_90a compute_80"
extern const char* const kCudaVersion;    // e.g. "13.0"
extern const bool kIsEmulated;            // kernels run on the CPU, in the host emulator

}  // namespace pytransformer
