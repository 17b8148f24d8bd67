// Which thread runs next, and where the threads of a block wait for each other.
#pragma once

#include <bit>
#include <exception>

namespace emulator {

static void shuffle_warps() {
  const int schedule = options().schedule;
  for (int i = 0; i < state.num_warps; ++i) state.warp_order[i] = schedule == 1 ? state.num_warps - 1 - i : i;
  if (schedule < 2) return;
  for (int i = state.num_warps - 1; i > 0; --i) std::swap(state.warp_order[i], state.warp_order[random_bits() % (i + 1)]);
}

// A thread that can run, or -1.
static int pick() {
  const int schedule = options().schedule;
  if (schedule >= 2 && random_bits() % 16 == 0) shuffle_warps();
  for (int i = 0; i < state.num_warps; ++i) {
    const int warp = state.warp_order[i];
    uint32_t& ready = state.warps[warp].ready;
    if (ready == 0) continue;
    int chosen = schedule == 0 ? std::countr_zero(ready) : 31 - std::countl_zero(ready);
    if (schedule >= 2) {  // the next one that is ready, counted from a random lane
      const int first = static_cast<int>(random_bits() % 32);
      chosen = (first + std::countr_zero(std::rotr(ready, first))) % 32;
    }
    ready &= ~(1u << chosen);
    return warp * 32 + chosen;
  }
  return -1;
}

static std::string describe_deadlock() {
  std::string message = "deadlock or divergent barrier:";
  int shown = 0;
  const Fiber* before = nullptr;
  for (int thread = 0; thread < state.num_threads && shown < 4; ++thread) {
    const Fiber& fiber = state.fibers[thread];
    if ((state.warps[thread / 32].ended >> (thread % 32) & 1) != 0) {
      before = nullptr;
      continue;
    }
    const bool same = before != nullptr && before->waits_in == fiber.waits_in && before->location.line() == fiber.location.line();
    before = &fiber;
    if (same) continue;
    message += " [from " + thread_name(thread) + ": waits in " + fiber.waits_in + " at " + text(fiber.location) + "]";
    ++shown;
  }
  return message + "; threads that have ended: " + std::to_string(state.num_ended);
}

// The running thread gives up the CPU.
static void yield() {
  const int self = current_thread;
  const int next = state.failed ? -1 : pick();
  if (next == self) return;
  if (next >= 0) {
    switch_to_thread(state.fibers[self], next);
  } else {
    if (!state.failed && state.num_ended < state.num_threads) {
      state.failed = true;
      state.error = describe_deadlock();
    }
    leave_threads();
    switch_to(state.fibers[self], state.host, -1);
  }
  enter_threads();
}

[[noreturn]] void fail(const std::string& message) {
  if (current_thread < 0) throw Error(message);
  state.failed = true;
  state.error = thread_name(current_thread) + ": " + message;
  yield();
  __builtin_trap();  // a failed launch never comes back here
}

static void run_threads() {
  enter_threads();
  for (;;) {  // the fiber lives on from block to block
    sanitizers::acquire(&state.block_starts);
    try {
      state.body(state.argument);
    } catch (const std::exception& exception) {
      state.failed = true;
      state.error = thread_name(current_thread) + ": " + exception.what();
    }
    sanitizers::release(&state.block_ends);
    Fiber& self = state.fibers[current_thread];
    if (!self.copies.empty()) {
      state.failed = true;
      state.error = thread_name(current_thread) + ": ended with a cp.async that was never waited for";
      self.copies.clear();
    }
    state.warps[current_thread / 32].ended |= 1u << (current_thread % 32);
    ++state.num_ended;
    yield();
  }
}

void block_barrier(const char* what, const Location& location) {
  BlockBarrier& barrier = state.barrier;
  const int self = current_thread;
  Fiber& fiber = state.fibers[self];
  if (barrier.arrived == 0) {
    barrier.location = location;
  } else if (barrier.location.line() != location.line() || barrier.location.column() != location.column()) {
    fail(std::string("divergent barrier: ") + what + " at " + text(location) + " while others wait at " + text(barrier.location));
  }
  void* order = &barrier.order[barrier.generation % 2];
  sanitizers::release(order);
  fiber.location = location;
  fiber.waits_in = what;
  state.warps[self / 32].at_block_barrier |= 1u << (self % 32);
  if (++barrier.arrived == state.num_threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    shuffle_warps();
    for (int i = 0; i < state.num_warps; ++i) {
      Warp& warp = state.warps[i];
      warp.ready |= warp.at_block_barrier;
      warp.at_block_barrier = 0;
    }
  }
  yield();
  sanitizers::acquire(order);
}

}  // namespace emulator
