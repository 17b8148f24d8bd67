// What the lanes of a warp do together.
#pragma once

#include <bit>
#include <cstring>

namespace emulator {

void warp_collective(unsigned mask, void* exchange, void (*operation)(void**, unsigned), const char* what, const Location& location) {
  const int self = current_thread, first = self / 32 * 32;
  const unsigned own = 1u << (self % 32);
  Fiber& fiber = state.fibers[self];
  Warp& warp = state.warps[self / 32];
  const auto where = [&] { return std::string(what) + " at " + text(location); };  // a message is rarely wanted
  if ((mask & own) == 0) fail(where() + ": the calling lane is not in its mask");
  if ((mask & warp.ended) != 0) fail(where() + ": its mask names a lane that has ended");
  fiber.warp_mask = mask;
  fiber.exchange = exchange;
  fiber.operation = operation;
  fiber.location = location;
  fiber.waits_in = what;
  warp.at_warp_barrier |= own;
  if ((mask & ~warp.at_warp_barrier) != 0) return yield();
  void* exchanges[32];
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const Fiber& other = state.fibers[first + lane];
    if (other.warp_mask != mask) return yield();
    if (other.operation != operation) fail(where() + ": a lane in its mask is in " + other.waits_in + " at " + text(other.location));
    exchanges[lane] = other.exchange;
  }
  operation(exchanges, mask);
  warp.at_warp_barrier &= ~mask;
  warp.ready |= mask;
  yield();
}

static void no_exchange(void**, unsigned) {}

void warp_barrier(unsigned mask, const Location& location) {
  // What it orders, for the sanitizer: two addresses per warp, alternating.
  static char orders[kMaxWarps][2];
  static unsigned generations[kMaxThreads];
  void* order = &orders[current_thread / 32][generations[current_thread]++ % 2];
  sanitizers::release(order);
  warp_collective(mask, nullptr, &no_exchange, "__syncwarp", location);
  sanitizers::acquire(order);
}

struct Shuffle {
  uint64_t value;
  int source;
};

static void exchange_lanes(void** lanes, unsigned mask) {
  uint64_t values[32];
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    values[lane] = static_cast<Shuffle*>(lanes[lane])->value;
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    auto& to = *static_cast<Shuffle*>(lanes[std::countr_zero(left)]);
    to.value = (mask >> to.source & 1) == 0 ? ~uint64_t{0} : values[to.source];  // undefined on a GPU: NaN
  }
}

uint64_t shuffle_bits(unsigned mask, uint64_t value, int source, const char* what, const Location& location) {
  Shuffle exchange{value, source};
  warp_collective(mask, &exchange, &exchange_lanes, what, location);
  return exchange.value;
}

struct Vote {
  bool in;
  unsigned out;
};

static void count_votes(void** lanes, unsigned mask) {
  unsigned result = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    result |= static_cast<unsigned>(static_cast<Vote*>(lanes[lane])->in) << lane;
  }
  for (unsigned left = mask; left != 0; left &= left - 1) static_cast<Vote*>(lanes[std::countr_zero(left)])->out = result;
}

unsigned ballot(unsigned mask, bool vote, const char* what, const Location& location) {
  Vote exchange{vote, 0};
  warp_collective(mask, &exchange, &count_votes, what, location);
  return exchange.out;
}

}  // namespace emulator
