// The emulator's settings and what it ran last, for the tests (ctypes).
#include "cuda_emulator.h"

extern "C" __attribute__((visibility("default"))) void pytransformer_emulator_configure(int schedule, int stub_launches, int num_sms,
                                                                                        int shared_memory) {
  emulator::options() = {schedule, stub_launches != 0, emulator::find_device({num_sms, shared_memory})};
}

// How often the runtime was asked for a device's limits (0), or to allow a kernel more shared memory (1).
extern "C" __attribute__((visibility("default"))) int pytransformer_emulator_runtime_calls(int kind) {
  return kind == 0 ? emulator::runtime_calls.limits : emulator::runtime_calls.allowances;
}

// Blocks of the last launch.
extern "C" __attribute__((visibility("default"))) int pytransformer_emulator_blocks() { return static_cast<int>(gridDim.x * gridDim.y * gridDim.z); }
