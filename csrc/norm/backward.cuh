// LayerNorm and RMSNorm, backward.
//
//   g = dy * (weight + weight_offset)
//   dx = rstd * (g - xhat * mean(g * xhat) - mean(g)) + ds             RMSNorm: without mean(g)
//   dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
//
// Bound by memory: dy and s are read, dx is written (and ds read), b bytes per element each. A fixed number of blocks share the rows; each
// keeps its sums of dweight and dbias in registers and writes them as one partial row, and a second launch adds the partial rows up in
// order: the same bits each run. The next row is on its way to shared memory (cp.async) while the present one is worked on.
// Rows too wide for a block's registers: their two sums first, then blocks of columns, in which nothing is reduced across threads.
#pragma once

#include "../common/ptx.cuh"
#include "access.cuh"

namespace pytransformer::norm {

inline constexpr int kMaxRowThreads = 512;
inline constexpr int kColumnThreads = 256;
inline constexpr int kReduceCols = 32, kReduceSlices = 16;

// The arrays of a block of the row kernel in dynamic shared memory, after the scratch of its sums.
struct BackwardShared {
  size_t weight, dy, s, ds, bytes;
};

// `elements` per block and tensor; ds has two slots, as it is read when the next row's is already on its way.
inline BackwardShared backward_shared(const NormBackward& call, int64_t elements_of_row, int64_t elements, bool staged) {
  BackwardShared at{};
  at.weight = kScratchBytes;
  at.dy = at.weight + (call.weight != nullptr ? static_cast<size_t>(elements_of_row) * sizeof(float) : 0);
  at.s = at.dy + (staged ? static_cast<size_t>(elements * size_of(call.dy_type)) : 0);
  at.ds = at.s + (staged ? static_cast<size_t>(elements * size_of(call.s_type)) : 0);
  at.bytes = at.ds + (staged && call.ds != nullptr ? 2 * static_cast<size_t>(elements * size_of(call.s_type)) : 0);
  return at;
}

// Starts copying N elements of `bytes` each.
template <int N>
__device__ __forceinline__ void copy_async(unsigned char* to, const void* from, int64_t index, int bytes) {
  const auto* source = static_cast<const unsigned char*>(from) + index * bytes;
  if (N * bytes == 8) {
    ptx::cp_async<8>(to, source);
    return;
  }
  ptx::cp_async<16>(to, source);
  if (N * bytes == 32) ptx::cp_async<16>(to + 16, source + 16);
}

// One partial row: the columns' sums over the rows of a block, which threads of several rows hold if blockDim.y > 1.
template <int VEC, int CHUNKS>
__device__ __forceinline__ void store_partial_row(const float (&sums)[CHUNKS][VEC], int vectors, float* partial, float* shared_rows) {
  const int threads = blockDim.x;
  if (blockDim.y == 1) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int vector = i * threads + static_cast<int>(threadIdx.x);
      if (vector < vectors) store_pieces<VEC>(partial + vector * VEC, sums[i]);
    }
    return;
  }
  const int held = threads * CHUNKS * VEC;
  __syncthreads();  // shared_rows may be in use
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    store_pieces<VEC>(shared_rows + threadIdx.y * held + (i * threads + static_cast<int>(threadIdx.x)) * VEC, sums[i]);
  }
  __syncthreads();
  const int num_threads = static_cast<int>(blockDim.y) * threads;
  for (int col = static_cast<int>(threadIdx.y) * threads + static_cast<int>(threadIdx.x); col < vectors * VEC; col += num_threads) {
    float sum = 0.0f;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += shared_rows[y * held + col];
    partial[col] = sum;
  }
}

// Whole rows: blockDim.x threads hold a row, CHUNKS vectors each, and a block has blockDim.y rows at a time.
template <class T, int VEC, int CHUNKS>
__global__ void __launch_bounds__(kMaxRowThreads) norm_backward_rows_kernel(const NormBackward call, const BackwardShared at,
                                                                            size_t dbias_partials) {
  constexpr bool STAGED = VEC > 1;  // an element alone is too small for cp.async
  PYT_DYNAMIC_SHARED(shared);
  float* weights = reinterpret_cast<float*>(shared + at.weight);
  const int threads = blockDim.x, vectors = static_cast<int>(call.cols / VEC);
  const int thread = threadIdx.y * threads + threadIdx.x, num_threads = blockDim.y * threads;
  const int dy_bytes = size_of(call.dy_type);
  const auto vector_of = [&](int chunk) { return chunk * threads + static_cast<int>(threadIdx.x); };
  // Where this thread, and no other, keeps a vector of the next row.
  const auto slot_of = [&](int chunk) { return static_cast<size_t>(chunk * num_threads + thread) * VEC; };

  if (call.weight != nullptr) {
    with_type(call.weight_type, [&](auto tag) {
      const auto* weight = static_cast<const typename decltype(tag)::Element*>(call.weight);
      for (int col = thread; col < vectors * VEC; col += num_threads) weights[col] = to_float(weight[col]) + call.weight_offset;
    });
    __syncthreads();
  }

  float next_rstd = 0.0f, next_mean = 0.0f;
  const auto prefetch = [&](int64_t row, int parity) {
    if (row >= call.rows) return;
    next_rstd = call.rstd[row];
    if (call.mean != nullptr) next_mean = call.mean[row];
    if constexpr (STAGED) {
      const int64_t dy = row_offset(row, call.rows_per_group, call.dy_strides), s = row_offset(row, call.rows_per_group, call.s_strides);
      const int64_t ds = row_offset(row, call.rows_per_group, call.ds_strides);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        if (vector_of(i) >= vectors) continue;
        copy_async<VEC>(shared + at.dy + slot_of(i) * dy_bytes, call.dy, dy + vector_of(i) * VEC, dy_bytes);
        copy_async<VEC>(shared + at.s + slot_of(i) * sizeof(T), call.s, s + vector_of(i) * VEC, sizeof(T));
        if (call.ds == nullptr) continue;
        const size_t slot = slot_of(i) + static_cast<size_t>(parity * CHUNKS * num_threads) * VEC;
        copy_async<VEC>(shared + at.ds + slot * sizeof(T), call.ds, ds + vector_of(i) * VEC, sizeof(T));
      }
      ptx::cp_async_commit();
    }
  };

  float dweight[CHUNKS][VEC] = {}, dbias[CHUNKS][VEC] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int parity = 0;
  prefetch(row, parity);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < call.rows; first += step, row += step, parity ^= 1) {
    const bool is_row = row < call.rows;  // rows past the end stay for the shuffles
    const float rstd = next_rstd, mean = next_mean;
    float g[CHUNKS][VEC], xhat[CHUNKS][VEC];
    if constexpr (STAGED) ptx::cp_async_wait<0>();
    with_type(call.dy_type, [&](auto tag) {
      using D = typename decltype(tag)::Element;
      const D* dy = STAGED ? reinterpret_cast<const D*>(shared + at.dy) : row_of<D>(call.dy, row, call.rows_per_group, call.dy_strides);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        if (is_row && vector_of(i) < vectors) load_pieces<VEC>(g[i], dy + (STAGED ? slot_of(i) : vector_of(i)));
      }
    });
    const T* s = STAGED ? reinterpret_cast<const T*>(shared + at.s) : row_of<T>(call.s, row, call.rows_per_group, call.s_strides);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (is_row && vector_of(i) < vectors) {
        load_pieces<VEC>(xhat[i], s + (STAGED ? slot_of(i) : vector_of(i)));
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          xhat[i][j] = (xhat[i][j] - mean) * rstd;
          dweight[i][j] += g[i][j] * xhat[i][j];
          dbias[i][j] += g[i][j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[i][j] = xhat[i][j] = 0.0f;
      }
    }
    // What was in the slots is in registers now: the next row may come.
    prefetch(row + step, parity ^ 1);

    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (call.weight != nullptr && vector_of(i) < vectors) {
        float weight[VEC];
        load_pieces<VEC>(weight, weights + vector_of(i) * VEC);
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[i][j] *= weight[j];
      }
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        sums[0] += g[i][j] * xhat[i][j];
        sums[1] += g[i][j];
      }
    }
    // Two scratches in turn: one barrier per row is enough.
    row_sums(sums, reinterpret_cast<float*>(shared) + parity * 2 * kWarpSize);
    const float g_xhat = sums[0] / static_cast<float>(call.cols);
    const float g_mean = call.mean != nullptr ? sums[1] / static_cast<float>(call.cols) : 0.0f;
    T* dx = static_cast<T*>(call.dx) + row * call.cols;
    const T* ds = STAGED ? reinterpret_cast<const T*>(shared + at.ds) + static_cast<size_t>(parity * CHUNKS * num_threads) * VEC
                         : row_of<T>(call.ds, row, call.rows_per_group, call.ds_strides);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (!is_row || vector_of(i) >= vectors) continue;
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[i][j] = (g[i][j] - xhat[i][j] * g_xhat - g_mean) * rstd;
      if (call.ds != nullptr) {
        float passed[VEC];
        load_pieces<VEC>(passed, ds + (STAGED ? slot_of(i) : vector_of(i)));
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[i][j] += passed[j];
      }
      store_pieces<VEC>(dx + vector_of(i) * VEC, g[i]);
    }
  }
  float* partial = call.workspace + static_cast<int64_t>(blockIdx.x) * call.cols;
  if (call.dweight != nullptr) store_partial_row<VEC, CHUNKS>(dweight, vectors, partial, weights);
  if (call.dbias != nullptr) store_partial_row<VEC, CHUNKS>(dbias, vectors, partial + dbias_partials, weights);
}

// Wide rows, first launch: the sums of g * xhat and of g over a part of a row, in sums[row][part][2].
template <class T, int VEC>
__global__ void __launch_bounds__(kColumnThreads) norm_backward_sums_kernel(const NormBackward call, float* row_parts, int parts,
                                                                            int vectors_per_part) {
  constexpr int UNROLL = 4;
  PYT_DYNAMIC_SHARED(shared);
  const int64_t row = blockIdx.x / parts;
  const int vectors = static_cast<int>(call.cols / VEC), begin = static_cast<int>(blockIdx.x % parts) * vectors_per_part;
  const int end = vectors - begin < vectors_per_part ? vectors : begin + vectors_per_part;
  const float rstd = call.rstd[row], mean = call.mean != nullptr ? call.mean[row] : 0.0f;
  const T* s = row_of<T>(call.s, row, call.rows_per_group, call.s_strides);
  float sums[2] = {0.0f, 0.0f};
  for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += UNROLL * kColumnThreads) {
    const auto is_in = [&](int i) { return first + i * kColumnThreads < end; };
    const auto column_of = [&](int i) { return (first + i * kColumnThreads) * VEC; };
    float g[UNROLL][VEC], xhat[UNROLL][VEC];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if (is_in(i)) load_pieces<VEC>(xhat[i], s + column_of(i));
    }
    with_type(call.dy_type, [&](auto tag) {
      using D = typename decltype(tag)::Element;
      const D* dy = row_of<D>(call.dy, row, call.rows_per_group, call.dy_strides);
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        if (is_in(i)) load_pieces<VEC>(g[i], dy + column_of(i));
      }
    });
    if (call.weight != nullptr) {
      with_type(call.weight_type, [&](auto tag) {
        using W = typename decltype(tag)::Element;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
          if (!is_in(i)) continue;
          float weight[VEC];
          load_pieces<VEC>(weight, static_cast<const W*>(call.weight) + column_of(i));
#pragma unroll
          for (int j = 0; j < VEC; ++j) g[i][j] *= weight[j] + call.weight_offset;
        }
      });
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if (!is_in(i)) continue;
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        sums[0] += g[i][j] * ((xhat[i][j] - mean) * rstd);
        sums[1] += g[i][j];
      }
    }
  }
  row_sums(sums, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) {
    row_parts[2 * static_cast<int64_t>(blockIdx.x)] = sums[0];
    row_parts[2 * static_cast<int64_t>(blockIdx.x) + 1] = sums[1];
  }
}

// Second launch: one vector of columns per thread, every gridDim.y-th row.
template <class T, int VEC>
__global__ void __launch_bounds__(kColumnThreads) norm_backward_columns_kernel(const NormBackward call, const float* row_parts, int parts,
                                                                               size_t dbias_partials) {
  constexpr int UNROLL = 4;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * VEC;
  if (column >= call.cols) return;
  float weight[VEC], dweight[VEC] = {}, dbias[VEC] = {};
#pragma unroll
  for (int j = 0; j < VEC; ++j) weight[j] = 1.0f;
  if (call.weight != nullptr) {
    with_type(call.weight_type, [&](auto tag) {
      load_pieces<VEC>(weight, static_cast<const typename decltype(tag)::Element*>(call.weight) + column);
    });
#pragma unroll
    for (int j = 0; j < VEC; ++j) weight[j] += call.weight_offset;
  }
  const int64_t step = gridDim.y;
  for (int64_t first = blockIdx.y; first < call.rows; first += UNROLL * step) {
    float g[UNROLL][VEC], s[UNROLL][VEC];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int64_t row = first + i * step;
      if (row < call.rows) load_pieces<VEC>(s[i], row_of<T>(call.s, row, call.rows_per_group, call.s_strides) + column);
    }
    with_type(call.dy_type, [&](auto tag) {
      using D = typename decltype(tag)::Element;
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        const int64_t row = first + i * step;
        if (row < call.rows) load_pieces<VEC>(g[i], row_of<D>(call.dy, row, call.rows_per_group, call.dy_strides) + column);
      }
    });
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int64_t row = first + i * step;
      if (row >= call.rows) continue;
      const float rstd = call.rstd[row], mean = call.mean != nullptr ? call.mean[row] : 0.0f;
      float g_xhat = 0.0f, g_mean = 0.0f;
      for (int part = 0; part < parts; ++part) {
        g_xhat += row_parts[2 * (row * parts + part)];
        g_mean += row_parts[2 * (row * parts + part) + 1];
      }
      g_xhat /= static_cast<float>(call.cols);
      g_mean = call.mean != nullptr ? g_mean / static_cast<float>(call.cols) : 0.0f;
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float xhat = (s[i][j] - mean) * rstd;
        dweight[j] += g[i][j] * xhat;
        dbias[j] += g[i][j];
        g[i][j] = (g[i][j] * weight[j] - xhat * g_xhat - g_mean) * rstd;
      }
      if (call.ds != nullptr) {
        float passed[VEC];
        load_pieces<VEC>(passed, row_of<T>(call.ds, row, call.rows_per_group, call.ds_strides) + column);
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[i][j] += passed[j];
      }
      store_pieces<VEC>(static_cast<T*>(call.dx) + row * call.cols + column, g[i]);
    }
  }
  float* partial = call.workspace + static_cast<int64_t>(blockIdx.y) * call.cols + column;
  if (call.dweight != nullptr) store_pieces<VEC>(partial, dweight);
  if (call.dbias != nullptr) store_pieces<VEC>(partial + dbias_partials, dbias);
}

template <class T, int VEC, int CHUNKS>
void launch_backward_rows(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  const int64_t elements_of_row = static_cast<int64_t>(plan.threads) * CHUNKS * VEC;
  const BackwardShared at = backward_shared(call, elements_of_row, elements_of_row * plan.rows_per_block, VEC > 1);
  launch("norm_backward_rows_kernel", &norm_backward_rows_kernel<T, VEC, CHUNKS>, dim3(static_cast<unsigned>(plan.programs)),
         dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows_per_block)), plan.shared_bytes, stream, call, at,
         plan.partial_floats);
}

template <class T, int VEC>
void launch_backward_columns(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream) {
  float* row_parts = call.workspace + 2 * plan.partial_floats;
  launch("norm_backward_sums_kernel", &norm_backward_sums_kernel<T, VEC>, dim3(static_cast<unsigned>(call.rows * plan.splits)),
         dim3(kColumnThreads), plan.shared_bytes, stream, call, row_parts, plan.splits, plan.vectors_per_split);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.cols / VEC, kColumnThreads)), static_cast<unsigned>(plan.programs));
  launch("norm_backward_columns_kernel", &norm_backward_columns_kernel<T, VEC>, grid, dim3(kColumnThreads), 0, stream, call, row_parts,
         plan.splits, plan.partial_floats);
}

}  // namespace pytransformer::norm
