// Host twins of the PTX that csrc/common/ptx.cuh wraps: asynchronous copies, ldmatrix, and tensor-core products.
#pragma once

#include <bit>
#include <cstring>

namespace emulator {

static void check_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(std::string("misaligned address in ") + what);
}

// --- cp.async: the data lands at the latest moment allowed, and is NaN until then -------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  check_aligned(shared, bytes, "cp.async (shared memory)");
  check_aligned(global, bytes, "cp.async (global memory)");
  Fiber& self = state.fibers[current_thread];
  sanitizers::will_write(shared, bytes);
  memset(shared, 0xff, bytes);
  self.copies.push_back({shared, global, bytes, valid, self.committed_groups});
}

void cp_async_commit() { ++state.fibers[current_thread].committed_groups; }

static void land(const AsyncCopy& copy) {
  sanitizers::will_write(copy.shared, copy.bytes);
  if (copy.valid) {
    sanitizers::will_read(copy.global, copy.bytes);
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
}

void cp_async_wait(int pending) {
  Fiber& self = state.fibers[current_thread];
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
static void distribute_matrices(void** lanes, unsigned) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < 32; ++lane) memcpy(matrices[lane / 8][lane % 8], static_cast<MatrixRows*>(lanes[lane])->row, sizeof matrices[0][0]);
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const auto& matrix = matrices[i];
      static_cast<MatrixRows*>(lanes[lane])->result[i] = TRANSPOSED
                                                             ? matrix[column][row] | uint32_t{matrix[column + 1][row]} << 16
                                                             : matrix[row][column] | uint32_t{matrix[row][column + 1]} << 16;
    }
  }
}

void ldmatrix_x4(uint32_t (&matrices)[4], const void* row, bool transposed, const Location& location) {
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

// The float32 that a 16-bit number is; by the bits, as a compiler without float16 calls a function for each.
static float bfloat16_value(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

static float float16_value(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const bool is_finite = (bits & 0x7c00) != 0x7c00;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);  // subnormals, too
  return std::bit_cast<float>((is_finite ? scaled : magnitude | 0x7f800000) | sign);
}

template <float (*VALUE)(uint32_t)>
static void multiply_fragments(void** lanes, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<Fragments*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int high = 0; high < 2; ++high) {
      const auto value = [&](uint32_t word) { return VALUE(high ? word >> 16 : word & 0xffff); };
      a[group][pair + high] = value(from.a[0]);
      a[group + 8][pair + high] = value(from.a[1]);
      a[group][pair + 8 + high] = value(from.a[2]);
      a[group + 8][pair + 8 + high] = value(from.a[3]);
      b[pair + high][group] = value(from.b[0]);
      b[pair + 8 + high][group] = value(from.b[1]);
    }
  }
  float sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<Fragments*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) c[i] += sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

void mma_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location) {
  Fragments fragments{a, {b0, b1}, c};
  warp_collective(~0u, &fragments, &multiply_fragments<float16_value>, "mma.m16n8k16", location);
}

void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& location) {
  Fragments fragments{a, {b0, b1}, c};
  warp_collective(~0u, &fragments, &multiply_fragments<bfloat16_value>, "mma.m16n8k16", location);
}

}  // namespace emulator
