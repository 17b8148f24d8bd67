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

inline constexpr size_t kStackBytes = 256 * 1024;
inline constexpr size_t kGuardBytes = 4096;

static void run_threads();  // what a fiber does; scheduler.h

static char* stack_of(int thread) { return state.stacks + thread * kStackBytes; }

static void start(int thread) {
  if (state.stacks == nullptr) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for the stacks of the emulated threads");
    state.stacks = static_cast<char*>(memory);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stack_of(i), kGuardBytes, PROT_NONE);
  }
  char* stack = stack_of(thread);
  sanitizers::unpoison(stack + kGuardBytes, kStackBytes - kGuardBytes);
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // the return address of run_threads, which never returns
  *--top = reinterpret_cast<void*>(&run_threads);
  top -= 6;
#else
  top -= 20;
  top[11] = reinterpret_cast<void*>(&run_threads);  // x30
#endif
  state.fibers[thread].stack_pointer = top;
  state.fibers[thread].started = true;
}

// AddressSanitizer takes the stacks of all threads, which lie side by side, for one: it is told where the host gives the CPU to a block and
// where it comes back, which is much cheaper than at each switch between two threads.
#ifdef EMULATOR_ASAN
struct HostStack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
  bool is_left = false;  // and the first thread that runs has not said so yet
};
static HostStack host_stack;

static void leave_host() {
  host_stack.is_left = true;
  __sanitizer_start_switch_fiber(&host_stack.fake, state.stacks, state.num_threads * kStackBytes);
}
static void enter_threads() {
  if (!host_stack.is_left) return;
  host_stack.is_left = false;
  __sanitizer_finish_switch_fiber(nullptr, &host_stack.bottom, &host_stack.bytes);
}
static void leave_threads() { __sanitizer_start_switch_fiber(nullptr, host_stack.bottom, host_stack.bytes); }
static void enter_host() { __sanitizer_finish_switch_fiber(host_stack.fake, nullptr, nullptr); }
#else
static void leave_host() {}
static void enter_threads() {}
static void leave_threads() {}
static void enter_host() {}
#endif

// Suspends `from` and continues `to`, which is thread `index` (-1: the host).
static void switch_to(Fiber& from, Fiber& to, int index) {
  current_thread = index;
  if (index >= 0) threadIdx = to.thread_index;
#ifdef EMULATOR_TSAN
  constexpr unsigned kNoSynchronisation = 1;  // a switch orders nothing: only barriers do
  __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
#endif
  emulator_swap_stacks(&from.stack_pointer, to.stack_pointer);
}

static void switch_to_thread(Fiber& from, int thread) {
  if (!state.fibers[thread].started) start(thread);
  switch_to(from, state.fibers[thread], thread);
}

}  // namespace emulator
