// One stack per CUDA thread, and the switch between two of them (x86-64 and AArch64: callee-saved registers only).
#pragma once

#include <sys/mman.h>

extern "C" void emulator_swap_stacks(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.weak emulator_swap_stacks
.type emulator_swap_stacks, @function
emulator_swap_stacks:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_swap_stacks, .-emulator_swap_stacks
)");
#elif defined(__aarch64__)
asm(R"(
.text
.weak emulator_swap_stacks
.type emulator_swap_stacks, %function
emulator_swap_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_swap_stacks, .-emulator_swap_stacks
)");
#else
#error "the emulator switches stacks on x86-64 and AArch64 only"
#endif

namespace emulator {

inline constexpr size_t kGuardBytes = 4096;

void run_threads();  // what a fiber does; scheduler.h

EMULATOR_RUNTIME inline void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) throw Error("no memory for the stack of an emulated thread");
    mprotect(fiber.stack, kGuardBytes, PROT_NONE);
  }
  sanitizers::unpoison(fiber.stack + kGuardBytes, kStackBytes - kGuardBytes);
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // the return address of run_threads, which never returns
  *--top = reinterpret_cast<void*>(&run_threads);
  fiber.stack_pointer = top - 6;
#else
  top -= 20;
  top[11] = reinterpret_cast<void*>(&run_threads);  // x30
  fiber.stack_pointer = top;
#endif
  fiber.started = true;
  fiber.asan_fake_stack = nullptr;
}

EMULATOR_RUNTIME __attribute__((noinline)) inline void arrived([[maybe_unused]] Fiber& self) {
#ifdef EMULATOR_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self.asan_fake_stack, &bottom, &bytes);
  if (state.main_stack == nullptr) {
    state.main_stack = bottom;
    state.main_stack_bytes = bytes;
  }
#endif
}

// Suspends `from` and continues `to`, which is thread `index` (-1: the host).
EMULATOR_RUNTIME __attribute__((noinline)) inline void switch_to(Fiber& from, Fiber& to, int index) {
  state.current = index;
  if (index >= 0) threadIdx = to.thread_index;
#ifdef EMULATOR_ASAN
  const bool to_main = index < 0;
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to_main ? state.main_stack : to.stack + kGuardBytes,
                                 to_main ? state.main_stack_bytes : kStackBytes - kGuardBytes);
#endif
#ifdef EMULATOR_TSAN
  constexpr unsigned kNoSynchronisation = 1;  // a switch orders nothing: only barriers do
  __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
#endif
  emulator_swap_stacks(&from.stack_pointer, to.stack_pointer);
  arrived(from);
}

}  // namespace emulator
