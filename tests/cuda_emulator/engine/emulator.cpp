// The emulator itself: compiled once, optimised and without sanitizers, whatever the kernels are compiled with; where it touches a kernel's
// memory it tells the sanitizers so. The macros EMULATOR_ASAN and EMULATOR_TSAN say which ones the kernels have.
#include "cuda_emulator.h"

#include "sanitizers.h"
#include "state.h"
#include "fiber.h"
#include "scheduler.h"
#include "warp.h"
#include "tensor_core.h"
#include "grid.h"
