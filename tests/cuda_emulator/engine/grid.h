// Runs a grid: block after block, each thread of a block as a fiber.
#pragma once

#include <cstring>
#include <vector>

namespace emulator {

static std::vector<uint64_t> block_order(uint64_t count) {
  const int schedule = options().schedule;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule >= 2) {
    for (uint64_t i = count - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
  }
  return order;
}

static void check_sizes(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) throw Error("invalid block dimensions");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    throw Error("invalid grid dimensions");
  }
  check_shared_memory(name, shared_bytes);
}

static void prepare_shared(size_t bytes) {
  sanitizers::unpoison(shared_memory, kMostSharedMemory);
  memset(shared_memory, 0xff, bytes);  // NaN in every floating-point format
  sanitizers::poison(shared_memory + bytes, kMostSharedMemory - bytes);
}

static void run_block(dim3 block) {
  state.num_ended = 0;
  state.barrier.arrived = 0;
  for (int i = 0; i < state.num_warps; ++i) {
    const int lanes = std::min(32, state.num_threads - 32 * i);
    const uint32_t ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    state.warps[i] = {.ready = ready, .ended = ~ready};
  }
  for (int thread = 0; thread < state.num_threads; ++thread) {
    Fiber& fiber = state.fibers[thread];
    fiber.thread_index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
    fiber.committed_groups = 0;
#ifdef EMULATOR_TSAN
    if (fiber.tsan_fiber == nullptr) fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  sanitizers::release(&state.block_starts);
  shuffle_warps();
  const int first = pick();
  if (!state.fibers[first].started) start(first);  // before AddressSanitizer is told of the stacks
  leave_host();
  switch_to_thread(state.host, first);
  enter_host();
  sanitizers::acquire(&state.block_ends);  // the next block uses the same shared memory
}

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void* argument, void (*body)(void*)) {
  check_sizes(name, grid, block, shared_bytes);
  if (shared_memory == nullptr) {
    void* memory = mmap(nullptr, kMostSharedMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for emulated shared memory");
    shared_memory = static_cast<unsigned char*>(memory);
  }
  state.num_threads = static_cast<int>(block.x * block.y * block.z);
  state.num_warps = (state.num_threads + 31) / 32;
  state.body = body;
  state.argument = argument;
  state.failed = false;
  state.random = 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(options().schedule + 1);
  blockDim = block;
  gridDim = grid;
#ifdef EMULATOR_TSAN
  state.host.tsan_fiber = __tsan_get_current_fiber();
#endif
  for (const uint64_t index : block_order(uint64_t(grid.x) * grid.y * grid.z)) {
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    prepare_shared(shared_bytes);
    run_block(block);
    if (state.failed) break;
  }
  sanitizers::unpoison(shared_memory, kMostSharedMemory);
  if (state.failed) {
    for (Fiber& fiber : state.fibers) {
      fiber.started = false;  // abandoned in the middle: the next launch begins with fresh stacks
      fiber.copies.clear();
    }
    throw Error(std::string(name) + ": " + state.error);
  }
}

}  // namespace emulator
