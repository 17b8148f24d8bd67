// The emulator's settings, for the tests (ctypes).
#include "cuda_emulator.h"

extern "C" __attribute__((visibility("default"))) void pytransformer_emulator_configure(int schedule, int stub_launches, int num_sms) {
  emulator::options() = {schedule, stub_launches != 0, num_sms};
}
