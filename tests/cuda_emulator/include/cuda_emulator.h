// A host emulator for the subset of CUDA C++ that csrc/ uses: g++ compiles the same .cu files, and the kernels run on the CPU.
//
// One fiber per CUDA thread; the threads of a block are interleaved in an order that emulator::options().schedule chooses, blocks run one
// after another. A test tool: it finds out-of-bounds accesses, misaligned vectors, races, missing barriers and divergent ones, with the
// help of AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer. docs/cuda-emulator.md explains how to use it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Blocks run one after another, so static storage serves as their shared memory.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
// On a GPU arrays stay in registers only where everything is inlined. Here each call site would be compiled anew, with all of its checks.
#undef __forceinline__
#define __forceinline__ inline

#include "emulator/state.h"
#include "emulator/runtime.h"
#include "emulator/launch.h"
#include "emulator/ptx.h"
#include "emulator/cuda_names.h"
