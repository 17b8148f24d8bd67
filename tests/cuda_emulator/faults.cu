// Small kernels with faults that can be switched on: the emulator and the sanitizers must see every one of them (test_faults.py).
//
// Usage: faults NAME SCHEDULE. Exit status 0: the results were right; 3: wrong; 4: the emulator stopped the kernel; anything else: a sanitizer.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/common/ptx.cuh"
#include "../../csrc/common/vector.cuh"

namespace pytransformer {
namespace {

std::string fault;  // the one that is switched on, or "none"

bool has(const char* name) { return fault == name; }

// --- a row's sum and its maximum, by one block of four warps ----------------------------------------------------------------------------

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;

__global__ void row_kernel(const bfloat16* __restrict__ x, float* __restrict__ sums, float* __restrict__ scaled, int cols) {
  __shared__ float scratch[kWarps];
  constexpr int N = 8;
  const bfloat16* row = x + static_cast<int64_t>(blockIdx.x) * cols;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float values[N] = {};
  const int first = threadIdx.x * N;
  const int end = has("load past the end") ? cols + N : cols;
  if (first < end) load_floats<N>(values, row + first + (has("misaligned vector") ? 1 : 0));
  float sum = 0.0f, largest = -INFINITY;
  for (int i = 0; i < N; ++i) {
    sum += values[i];
    largest = fmaxf(largest, first < cols ? values[i] : -INFINITY);
  }
  if (has("shuffle by half a warp") && lane >= 16) return;
  sum = warp_reduce<kWarpSize>(sum, Sum{});
  largest = warp_reduce<kWarpSize>(largest, Max{});
  if (lane == 0) scratch[warp + (has("shared store past the end") ? 1 : 0)] = sum;
  if (has("divergent barrier")) {
    if (warp < 2) __syncthreads();
  } else if (has("different barriers")) {
    if (warp < 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (!has("missing barrier before reading")) {
    __syncthreads();
  }
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += scratch[i];
  if (!has("missing barrier before reuse")) __syncthreads();
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  float top = scratch[0];
  for (int i = 1; i < kWarps; ++i) top = fmaxf(top, scratch[i]);
  if (threadIdx.x == 0 && !(has("unwritten output") && blockIdx.x == 2)) sums[blockIdx.x] = total;
  if (first < cols) {
    for (int i = 0; i < N; ++i) values[i] /= top;
    store_floats<N>(scaled + static_cast<int64_t>(blockIdx.x) * cols + first, values);
  }
  if (has("barrier that half of the threads skip") && warp < 2) __syncthreads();
  if (has("store past the end") && threadIdx.x == 0) scaled[static_cast<int64_t>(gridDim.x) * cols] = 0.0f;
  if (has("store before the start") && threadIdx.x == 0) scaled[-1] = 0.0f;
}

bool run_rows() {
  constexpr int rows = 5, cols = 200;
  std::vector<bfloat16> x(rows * cols);
  for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<bfloat16>(static_cast<float>(i * 37 % 101) - 20.0f);
  std::vector<float> sums(rows, NAN), scaled(rows * cols, NAN);
  launch("row_kernel", &row_kernel, dim3(has("empty grid") ? 0 : rows, has("grid too high") ? 70000 : 1), dim3(kThreads), 0, nullptr,
         x.data(), sums.data(), scaled.data(), cols);
  for (int row = 0; row < rows; ++row) {
    float sum = 0.0f, top = -INFINITY;
    for (int col = 0; col < cols; ++col) {
      sum += to_float(x[row * cols + col]);
      top = fmaxf(top, to_float(x[row * cols + col]));
    }
    if (sums[row] != sum) return false;
    for (int col = 0; col < cols; ++col) {
      if (scaled[row * cols + col] != to_float(x[row * cols + col]) / top) return false;
    }
  }
  return true;
}

// --- a double-buffered pipeline: tile after tile of a row is copied in asynchronously and written out reversed --------------------------

constexpr int kTile = kThreads * 4;

__global__ void pipeline_kernel(const float* __restrict__ x, float* __restrict__ y, int num_tiles) {
  PYT_DYNAMIC_SHARED(memory);
  float* tiles = reinterpret_cast<float*>(memory);
  const int mine = threadIdx.x * 4, mirrored = kTile - 1;
  const auto fetch = [&](int tile) {
    ptx::cp_async<16>(tiles + tile % 2 * kTile + mine, x + tile * kTile + mine + (has("misaligned cp.async") ? 1 : 0));
  };
  fetch(0);
  ptx::cp_async_commit();
  for (int tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) fetch(tile + 1);
    ptx::cp_async_commit();
    if (has("one group waited for too few")) {
      ptx::cp_async_wait<2>();
    } else if (!has("missing wait")) {
      ptx::cp_async_wait<1>();
    }
    if (!has("missing barrier after wait")) __syncthreads();
    const float* current = tiles + tile % 2 * kTile;
    for (int i = 0; i < 4; ++i) y[tile * kTile + mine + i] = current[mirrored - (mine + i)];
    if (!has("missing trailing barrier")) __syncthreads();
  }
  ptx::cp_async_wait<0>();
}

bool run_pipeline() {
  constexpr int num_tiles = 5;
  std::vector<float> x(num_tiles * kTile), y(num_tiles * kTile, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  size_t bytes = 2 * kTile * sizeof(float) - (has("too little shared memory") ? 16 : 0);
  if (has("more shared memory than there is")) bytes = 228 * 1024;
  launch("pipeline_kernel", &pipeline_kernel, dim3(1), dim3(kThreads), bytes, nullptr, x.data(), y.data(), num_tiles);
  for (int tile = 0; tile < num_tiles; ++tile) {
    for (int i = 0; i < kTile; ++i) {
      if (y[tile * kTile + i] != x[tile * kTile + kTile - 1 - i]) return false;
    }
  }
  return true;
}

// --- lanes of a warp hand values to each other through shared memory --------------------------------------------------------------------

__global__ void warp_kernel(float* __restrict__ y) {
  PYT_DYNAMIC_SHARED(memory);
  float* slots = reinterpret_cast<float*>(memory);
  slots[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!has("missing warp barrier")) __syncwarp();
  const int neighbour = threadIdx.x / kWarpSize * kWarpSize + (threadIdx.x + 1) % kWarpSize;
  y[has("two threads write one element") ? threadIdx.x / 2 : threadIdx.x] = slots[neighbour];
}

bool run_warps() {
  std::vector<float> y(kThreads, NAN);
  launch("warp_kernel", &warp_kernel, dim3(1), dim3(has("block too large") ? 2048 : kThreads), kThreads * sizeof(float), nullptr, y.data());
  for (int thread = 0; thread < kThreads; ++thread) {
    if (y[thread] != static_cast<float>(thread / kWarpSize * kWarpSize + (thread + 1) % kWarpSize)) return false;
  }
  return true;
}

// --- host threads launch at the same time, each a block of another size -----------------------------------------------------------------

bool run_threads() {
  constexpr size_t kSmallest = 50 * 1024, kStep = 1024;
  constexpr int kHostThreads = 8;
  emulator::options().stub_launches = true;
  std::atomic<int> waiting{kHostThreads}, wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kHostThreads; ++i) {
    threads.emplace_back([&, i] {
      for (--waiting; waiting > 0;) std::this_thread::yield();
      wrong += device_limits().num_sms != 4;
      launch("warp_kernel", &warp_kernel, dim3(1), dim3(kThreads), kSmallest + static_cast<size_t>(i) * kStep, nullptr, nullptr);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const size_t allowed = emulator::allowances().get(reinterpret_cast<const void*>(&warp_kernel), emulator::current_device());
  return wrong == 0 && allowed == kSmallest + (kHostThreads - 1) * kStep && emulator::runtime_calls.limits == 1;
}

}  // namespace
}  // namespace pytransformer

int main(int argc, char** argv) {
  using namespace pytransformer;
  if (argc != 3) return 2;
  fault = argv[1];
  emulator::options().schedule = std::atoi(argv[2]);
  try {
    if (has("host threads") ? run_threads() : run_rows() && run_pipeline() && run_warps()) return 0;
    std::puts("wrong result");
    return 3;
  } catch (const emulator::Error& error) {
    std::printf("emulator: %s\n", error.what());
    return 4;
  }
}
