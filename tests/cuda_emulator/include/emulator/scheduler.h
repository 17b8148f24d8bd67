// Which thread runs next, and where threads wait for each other.
#pragma once

namespace emulator {

EMULATOR_RUNTIME inline void shuffle_warps() {
  const int schedule = options().schedule;
  for (int i = 0; i < state.num_warps; ++i) state.warp_order[i] = schedule == 1 ? state.num_warps - 1 - i : i;
  if (schedule < 2) return;
  for (int i = state.num_warps - 1; i > 0; --i) {  // no std::swap: ThreadSanitizer would see inside it
    const int j = static_cast<int>(random_bits() % (i + 1)), warp = state.warp_order[i];
    state.warp_order[i] = state.warp_order[j];
    state.warp_order[j] = warp;
  }
}

// A thread that can run, or -1.
EMULATOR_RUNTIME inline int pick() {
  const int schedule = options().schedule;
  if (schedule >= 2 && random_bits() % 16 == 0) shuffle_warps();
  for (int i = 0; i < state.num_warps; ++i) {
    const int warp = state.warp_order[i];
    const uint32_t ready = state.ready[warp];
    if (ready == 0) continue;
    int chosen = schedule == 0 ? __builtin_ctz(ready) : 31 - __builtin_clz(ready);
    if (schedule >= 2) {
      chosen = random_bits() % 32;
      while ((ready >> chosen & 1) == 0) chosen = (chosen + 1) % 32;
    }
    state.ready[warp] &= ~(1u << chosen);
    return warp * 32 + chosen;
  }
  return -1;
}

EMULATOR_RUNTIME inline void set_ready(int thread) {
  state.fibers[thread].status = Status::ready;
  state.ready[thread / 32] |= 1u << (thread % 32);
}

EMULATOR_RUNTIME inline std::string describe_deadlock() {
  std::string message = "deadlock or divergent barrier:";
  int shown = 0;
  const Fiber* before = nullptr;
  for (int thread = 0; thread < state.num_threads && shown < 4; ++thread) {
    const Fiber& fiber = state.fibers[thread];
    const bool same = before != nullptr && before->status == fiber.status && before->location.line() == fiber.location.line();
    before = &fiber;
    if (same || (fiber.status != Status::at_block_barrier && fiber.status != Status::at_warp_barrier)) continue;
    message += " [from " + thread_name(thread) + ": waits in " + fiber.waits_in + " at " + text(fiber.location) + "]";
    ++shown;
  }
  return message + "; threads that have ended: " + std::to_string(state.num_done);
}

// The running thread gives up the CPU.
EMULATOR_RUNTIME inline void yield() {
  const int self = state.current;
  const int next = state.failed ? -1 : pick();
  if (next == self) return;
  if (next >= 0) {
    Fiber& fiber = state.fibers[next];
    if (!fiber.started) start(fiber);
    switch_to(state.fibers[self], fiber, next);
    return;
  }
  if (!state.failed && state.num_done < state.num_threads) {
    state.failed = true;
    state.error = describe_deadlock();
  }
  switch_to(state.fibers[self], state.main, -1);
}

// Ends the launch with an error that names the running thread.
[[noreturn]] EMULATOR_RUNTIME inline void fail(const std::string& message) {
  if (state.current < 0) throw Error(message);
  state.failed = true;
  state.error = thread_name(state.current) + ": " + message;
  yield();
  __builtin_trap();  // a failed launch never comes back here
}

EMULATOR_RUNTIME inline void run_threads() {
  arrived(state.fibers[state.current]);
  for (;;) {  // the fiber lives on from block to block
    sanitizers::acquire(&state.block_starts);
    try {
      state.body(state.argument);
    } catch (const std::exception& exception) {
      state.failed = true;
      state.error = thread_name(state.current) + ": " + exception.what();
    }
    sanitizers::release(&state.block_ends);
    Fiber& self = state.fibers[state.current];
    if (!self.copies.empty()) {
      state.failed = true;
      state.error = thread_name(state.current) + ": ended with a cp.async that was never waited for";
      self.copies.clear();
    }
    self.status = Status::done;
    ++state.num_done;
    yield();
  }
}

// `count` threads meet at barrier `id`.
EMULATOR_RUNTIME inline void block_barrier(int id, int count, const char* what, const Location& location) {
  Barrier& barrier = state.barriers[id];
  const int self = state.current;
  Fiber& fiber = state.fibers[self];
  if (count % 32 != 0 && count != state.num_threads) fail(std::string(what) + ": the thread count is not a multiple of 32");
  if (count > state.num_threads) fail(std::string(what) + ": more threads than the block has");
  if (barrier.arrived == 0) {
    barrier.location = location;
    barrier.expected = count;
  } else if (barrier.expected != count || barrier.location.line() != location.line() ||
             barrier.location.column() != location.column()) {
    fail(std::string("divergent barrier: ") + what + " at " + text(location) + " while others wait at " + text(barrier.location));
  }
  void* order = &barrier.order[barrier.generation % 2];
  sanitizers::release(order);
  barrier.waiting[self / 32] |= 1u << (self % 32);
  fiber.location = location;
  fiber.waits_in = what;
  fiber.status = Status::at_block_barrier;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    shuffle_warps();
    for (int warp = 0; warp < state.num_warps; ++warp) {
      for (uint32_t left = barrier.waiting[warp]; left != 0; left &= left - 1) set_ready(warp * 32 + __builtin_ctz(left));
      barrier.waiting[warp] = 0;
    }
  }
  yield();
  sanitizers::acquire(order);
}

// The lanes named in `mask` meet; the last to arrive runs `operation` on the exchange records of all.
EMULATOR_RUNTIME inline void warp_collective(unsigned mask, void* exchange, void (*operation)(void**, unsigned), const char* what,
                                             const Location& location) {
  const int self = state.current, first = self / 32 * 32, own_lane = self % 32;
  Fiber& fiber = state.fibers[self];
  const auto where = [&] { return std::string(what) + " at " + text(location); };  // a message is rarely wanted
  if ((mask >> own_lane & 1) == 0) fail(where() + ": the calling lane is not in its mask");
  fiber.warp_mask = mask;
  fiber.exchange = exchange;
  fiber.operation = operation;
  fiber.location = location;
  fiber.waits_in = what;
  fiber.status = Status::at_warp_barrier;
  void* exchanges[32] = {};
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int thread = first + __builtin_ctz(left);
    const Fiber& other = state.fibers[thread];
    if (thread >= state.num_threads || other.status == Status::done) fail(where() + ": its mask names a lane that has ended");
    if (other.status != Status::at_warp_barrier || other.warp_mask != mask) {
      yield();
      return;
    }
    if (other.operation != operation) fail(where() + ": a lane in its mask is in " + other.waits_in + " at " + text(other.location));
    exchanges[thread - first] = other.exchange;
  }
  operation(exchanges, mask);
  for (unsigned left = mask; left != 0; left &= left - 1) set_ready(first + __builtin_ctz(left));
  yield();
}

}  // namespace emulator
