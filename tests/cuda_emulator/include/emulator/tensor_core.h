// Host twins of the PTX that csrc/common/ptx.cuh wraps: asynchronous copies, ldmatrix, and tensor-core products.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

namespace emulator {

EMULATOR_RUNTIME inline void check_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(std::string("misaligned address in ") + what);
}

// --- cp.async: the data lands at the latest moment allowed, and is NaN until then -------------------------------------------------------

EMULATOR_RUNTIME inline void cp_async(void* shared, const void* global, int bytes, bool valid) {
  check_aligned(shared, bytes, "cp.async (shared memory)");
  check_aligned(global, bytes, "cp.async (global memory)");
  Fiber& self = state.fibers[state.current];
  sanitizers::will_write(shared, bytes);
  memset(shared, 0xff, bytes);
  self.copies.push_back({shared, global, bytes, valid, self.committed_groups});
}

inline void cp_async_commit() { ++state.fibers[state.current].committed_groups; }

// Not hidden from the sanitizers: the reads of global memory and the writes to shared memory are the kernel's.
inline void land(const AsyncCopy& copy) {
  sanitizers::will_write(copy.shared, copy.bytes);
  if (copy.valid) {
    sanitizers::will_read(copy.global, copy.bytes);
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
}

inline void cp_async_wait(int pending) {
  Fiber& self = state.fibers[state.current];
  size_t landed = 0;
  while (landed < self.copies.size() && self.copies[landed].group < self.committed_groups - pending) land(self.copies[landed++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

// --- ldmatrix ---------------------------------------------------------------------------------------------------------------------------

struct MatrixRows {
  uint16_t row[8];
  uint32_t result[4];
};

template <bool TRANSPOSED>
EMULATOR_RUNTIME void distribute_matrices(void** lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) EMULATOR_RUNTIME {
        return uint32_t(static_cast<MatrixRows*>(lanes[matrix * 8 + row])->row[column]);
      };
      const int row = lane / 4, column = 2 * (lane % 4);
      static_cast<MatrixRows*>(lanes[lane])->result[matrix] =
          TRANSPOSED ? element(column, row) | element(column + 1, row) << 16 : element(row, column) | element(row, column + 1) << 16;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row, bool transposed, const Location& location) {
  check_aligned(row, 16, "ldmatrix");
  MatrixRows rows;
  sanitizers::will_read(row, sizeof rows.row);
  memcpy(rows.row, row, sizeof rows.row);
  warp_collective(~0u, &rows, transposed ? &distribute_matrices<true> : &distribute_matrices<false>, "ldmatrix", location);
  for (int i = 0; i < 4; ++i) matrices[i] = rows.result[i];
}

// --- mma.sync.m16n8k16: float32 accumulation --------------------------------------------------------------------------------------------

struct Fragments {
  const uint32_t* a;
  uint32_t b[2];
  float* c;
};

template <class T>
EMULATOR_RUNTIME float half_of(uint32_t word, int high) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(high ? word >> 16 : word)));
}

template <class T>
EMULATOR_RUNTIME void multiply_fragments(void** lanes, unsigned) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<Fragments*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int high = 0; high < 2; ++high) {
      a[group][pair + high] = half_of<T>(from.a[0], high);
      a[group + 8][pair + high] = half_of<T>(from.a[1], high);
      a[group][pair + 8 + high] = half_of<T>(from.a[2], high);
      a[group + 8][pair + 8 + high] = half_of<T>(from.a[3], high);
      b[group][pair + high] = half_of<T>(from.b[0], high);
      b[group][pair + 8 + high] = half_of<T>(from.b[1], high);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& to = *static_cast<Fragments*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const float* row = a[group + i / 2 * 8];
      const float* column = b[pair + i % 2];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      to.c[i] += sum;
    }
  }
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location) {
  Fragments fragments{a, {b0, b1}, c};
  warp_collective(~0u, &fragments, &multiply_fragments<T>, "mma.m16n8k16", location);
}

}  // namespace emulator
