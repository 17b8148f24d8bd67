// LayerNorm and RMSNorm, forward, with the residual addition fused in.
//
//   s = x + residual                                                   rounded to residual's dtype and returned; s = x without one
//   LayerNorm:  xhat = (s - mean(s)) * rstd,  rstd = 1 / sqrt(mean((s - mean(s))^2) + eps)
//   RMSNorm:    xhat = s * rstd,              rstd = 1 / sqrt(mean(s^2) + eps)
//   y = xhat * (weight + weight_offset) + bias                         float32 throughout, one rounding at the end
//
// Bound by memory: about 8 FLOP per element, 2b bytes per element of b bytes, 4b with a residual. x is read once: a row waits for its
// statistics in registers, or in shared memory where it is wide. Few wide rows are split over several blocks and read again from L2.
#pragma once

#include "access.cuh"

namespace pytransformer::norm {

// s + residual, rounded to the residual's type and stored in s, for the vectors of one thread; `vector_of(i)` = its i-th vector, or -1.
template <int VEC, int COUNT, class VectorOf>
__device__ __forceinline__ void add_residual(const NormForward& call, int64_t row, float (&s)[COUNT][VEC], VectorOf vector_of) {
  with_type(call.residual_type, [&](auto tag) {
    using S = typename decltype(tag)::Element;
    const S* residual = row_of<S>(call.residual, row, call.rows_per_group, call.residual_strides);
    S* sum = static_cast<S*>(call.s) + row * call.cols;
    // 16 elements in flight beside x's: more would cost registers that other warps need.
    constexpr int BATCH = COUNT * VEC > 16 ? 16 / VEC : COUNT;
#pragma unroll
    for (int first = 0; first < COUNT; first += BATCH) {
      float added[BATCH][VEC];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        if (vector_of(first + i) >= 0) load_pieces<VEC>(added[i], residual + vector_of(first + i) * VEC);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        if (vector_of(first + i) < 0) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) s[first + i][j] = to_float(from_float<S>(s[first + i][j] + added[i][j]));
        store_pieces<VEC>(sum + vector_of(first + i) * VEC, s[first + i]);
      }
    }
  });
}

// y of the vectors of one thread, given xhat.
template <class T, int VEC, int COUNT, class VectorOf>
__device__ __forceinline__ void scale_and_store(const NormForward& call, int64_t row, float (&xhat)[COUNT][VEC], VectorOf vector_of) {
  if (call.weight != nullptr) {
    with_type(call.weight_type, [&](auto tag) {
      using W = typename decltype(tag)::Element;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (vector_of(i) < 0) continue;
        float weight[VEC];
        load_pieces<VEC>(weight, static_cast<const W*>(call.weight) + vector_of(i) * VEC);
#pragma unroll
        for (int j = 0; j < VEC; ++j) xhat[i][j] *= weight[j] + call.weight_offset;
      }
    });
  }
  if (call.bias != nullptr) {
    with_type(call.bias_type, [&](auto tag) {
      using B = typename decltype(tag)::Element;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (vector_of(i) < 0) continue;
        float bias[VEC];
        load_pieces<VEC>(bias, static_cast<const B*>(call.bias) + vector_of(i) * VEC);
#pragma unroll
        for (int j = 0; j < VEC; ++j) xhat[i][j] += bias[j];
      }
    });
  }
  T* y = static_cast<T*>(call.y) + row * call.cols;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (vector_of(i) >= 0) store_pieces<VEC>(y + vector_of(i) * VEC, xhat[i]);
  }
}

__device__ __forceinline__ void store_statistics(const NormForward& call, int64_t row, float mean, float rstd) {
  if (call.mean != nullptr) call.mean[row] = mean;
  if (call.rstd != nullptr) call.rstd[row] = rstd;
}

// Rows in registers: blockDim.x threads hold a row, CHUNKS vectors each, and a block has blockDim.y rows.
template <class T, int VEC, int CHUNKS>
__global__ void __launch_bounds__(512) norm_forward_rows_kernel(const NormForward call) {
  PYT_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Rows past the end stay for the shuffles, with nothing to load.
  const int vectors = row < call.rows ? static_cast<int>(call.cols / VEC) : 0;
  const auto vector_of = [&](int chunk) {
    const int vector = chunk * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    return vector < vectors ? vector : -1;
  };
  const T* x = row_of<T>(call.x, row, call.rows_per_group, call.x_strides);
  Vector<T, VEC> raw[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (vector_of(i) >= 0) raw[i] = load_vector<VEC>(x + vector_of(i) * VEC);
  }
  float s[CHUNKS][VEC];
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) s[i][j] = vector_of(i) >= 0 ? to_float(raw[i].values[j]) : 0.0f;
  }
  if (call.residual != nullptr) add_residual<VEC, CHUNKS>(call, row, s, vector_of);

  float mean = 0.0f;
  if (!call.is_rms) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum += s[i][j];
    }
    mean = row_sum(sum, scratch) / static_cast<float>(call.cols);
  }
  // The variance is taken from centred values: E[s^2] - E[s]^2 would cancel where the mean is large.
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (vector_of(i) < 0) continue;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      s[i][j] -= mean;
      squares += s[i][j] * s[i][j];
    }
  }
  const float rstd = rsqrtf(row_sum(squares, scratch + kWarpSize) / static_cast<float>(call.cols) + call.eps);
  if (threadIdx.x == 0 && row < call.rows) store_statistics(call, row, mean, rstd);
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) s[i][j] *= rstd;
  }
  scale_and_store<T, VEC, CHUNKS>(call, row, s, vector_of);
}

// Mean and sum of squared deviations of `count` elements.
struct Moments {
  float mean, squares, count;
};

// Vectors of one thread in flight together where a row is walked.
inline constexpr int kUnroll = 4;
inline constexpr int kWalkThreads = 512;

// Moments of what this thread reads of vectors begin..end of a row; x + residual is stored on the way. The first `num_staged` vectors of s
// are left in `staged`, in s's own type.
template <class T, int VEC>
__device__ __forceinline__ Moments thread_moments(const NormForward& call, int64_t row, int begin, int end, unsigned char* staged,
                                                  int num_staged) {
  const T* x = row_of<T>(call.x, row, call.rows_per_group, call.x_strides);
  Moments moments{0.0f, 0.0f, 0.0f};
  for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += kUnroll * kWalkThreads) {
    const auto vector_of = [&](int i) {
      const int vector = first + i * kWalkThreads;
      return vector < end ? vector : -1;
    };
    Vector<T, VEC> raw[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (vector_of(i) >= 0) raw[i] = load_vector<VEC>(x + vector_of(i) * VEC);
    }
    float s[kUnroll][VEC];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) s[i][j] = vector_of(i) >= 0 ? to_float(raw[i].values[j]) : 0.0f;
    }
    if (call.residual != nullptr) add_residual<VEC, kUnroll>(call, row, s, vector_of);
    if (first < num_staged) {
      with_type(call.residual != nullptr ? call.residual_type : call.x_type, [&](auto tag) {
        using S = typename decltype(tag)::Element;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          if (vector_of(i) >= 0 && vector_of(i) < num_staged) store_pieces<VEC>(reinterpret_cast<S*>(staged) + vector_of(i) * VEC, s[i]);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (vector_of(i) < 0) continue;
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum += s[i][j];
      const float mean = call.is_rms ? 0.0f : sum * (1.0f / VEC);
#pragma unroll
      for (int j = 0; j < VEC; ++j) squares += (s[i][j] - mean) * (s[i][j] - mean);
      // Chan, Golub and LeVeque's update; with means of 0 it adds the squares up.
      const float delta = mean - moments.mean, count = moments.count + VEC, share = __fdividef(static_cast<float>(VEC), count);
      moments.mean += delta * share;
      moments.squares += squares + delta * delta * (moments.count * share);
      moments.count = count;
    }
  }
  return moments;
}

// The moments of all threads of a block, in every thread; `count` of them together. The first thread has some.
__device__ __forceinline__ Moments block_moments(const NormForward& call, Moments moments, float count, float* scratch) {
  float mean = 0.0f;
  if (!call.is_rms) {
    // Means are merged by what they differ from one of them: sums of many large ones would be rounded coarsely.
    float* first = scratch + 2 * kWarpSize;
    if (threadIdx.x == 0) *first = moments.mean;
    __syncthreads();
    mean = *first + row_sum((moments.mean - *first) * moments.count, scratch) / count;
  }
  const float shift = moments.mean - mean;
  return {mean, row_sum(moments.squares + moments.count * shift * shift, scratch + kWarpSize), count};
}

// y of vectors begin..end of a row whose statistics are known.
template <class T, int VEC>
__device__ __forceinline__ void normalise(const NormForward& call, int64_t row, int begin, int end, const unsigned char* staged, int num_staged,
                                          float mean, float rstd) {
  for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += kUnroll * kWalkThreads) {
    const auto vector_of = [&](int i) {
      const int vector = first + i * kWalkThreads;
      return vector < end ? vector : -1;
    };
    float s[kUnroll][VEC];
    with_type(call.residual != nullptr ? call.residual_type : call.x_type, [&](auto tag) {
      using S = typename decltype(tag)::Element;
      // Each thread reads back what it has written itself.
      const S* from = call.residual != nullptr ? static_cast<const S*>(call.s) + row * call.cols
                                               : row_of<S>(call.x, row, call.rows_per_group, call.x_strides);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (vector_of(i) < 0) continue;
        load_pieces<VEC>(s[i], (vector_of(i) < num_staged ? reinterpret_cast<const S*>(staged) : from) + vector_of(i) * VEC);
      }
    });
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (vector_of(i) < 0) continue;
#pragma unroll
      for (int j = 0; j < VEC; ++j) s[i][j] = (s[i][j] - mean) * rstd;
    }
    scale_and_store<T, VEC, kUnroll>(call, row, s, vector_of);
  }
}

// A wide row per block, which waits in shared memory; what does not fit there is read again, from L2.
template <class T, int VEC>
__global__ void __launch_bounds__(kWalkThreads) norm_forward_wide_kernel(const NormForward call, int num_staged) {
  PYT_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  unsigned char* staged = shared + kScratchBytes;
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(call.cols / VEC);
  const float count = static_cast<float>(call.cols);
  const Moments moments = block_moments(call, thread_moments<T, VEC>(call, row, 0, vectors, staged, num_staged), count, scratch);
  const float rstd = rsqrtf(moments.squares / count + call.eps);
  if (threadIdx.x == 0) store_statistics(call, row, moments.mean, rstd);
  normalise<T, VEC>(call, row, 0, vectors, staged, num_staged, moments.mean, rstd);
}

// A wide row shared by several blocks, first launch: the moments of each part, in workspace[row][part][2].
template <class T, int VEC>
__global__ void __launch_bounds__(kWalkThreads) norm_forward_parts_kernel(const NormForward call, int parts, int vectors_per_part) {
  PYT_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t row = blockIdx.x / parts;
  const int vectors = static_cast<int>(call.cols / VEC), begin = static_cast<int>(blockIdx.x % parts) * vectors_per_part;
  const int end = vectors - begin < vectors_per_part ? vectors : begin + vectors_per_part;
  const float count = static_cast<float>((end - begin) * VEC);
  const Moments moments = block_moments(call, thread_moments<T, VEC>(call, row, begin, end, nullptr, 0), count, scratch);
  if (threadIdx.x == 0) {
    call.workspace[2 * static_cast<int64_t>(blockIdx.x)] = moments.mean;
    call.workspace[2 * static_cast<int64_t>(blockIdx.x) + 1] = moments.squares;
  }
}

// Second launch: every warp merges the parts of its row, in the same order, and the block normalises its part.
template <class T, int VEC>
__global__ void __launch_bounds__(kWalkThreads) norm_forward_apply_kernel(const NormForward call, int parts, int vectors_per_part) {
  const int64_t row = blockIdx.x / parts;
  const int vectors = static_cast<int>(call.cols / VEC), begin = static_cast<int>(blockIdx.x % parts) * vectors_per_part;
  const int end = vectors - begin < vectors_per_part ? vectors : begin + vectors_per_part;
  const float* of_row = call.workspace + 2 * row * parts;
  const auto count_of = [&](int part) {
    const int left = vectors - part * vectors_per_part;
    return static_cast<float>((left < vectors_per_part ? left : vectors_per_part) * VEC);
  };
  const int lane = threadIdx.x % kWarpSize;
  const float count = static_cast<float>(call.cols);
  float mean = 0.0f, squares = 0.0f;
  for (int part = lane; part < parts; part += kWarpSize) mean += (of_row[2 * part] - of_row[0]) * count_of(part);
  mean = of_row[0] + warp_reduce<kWarpSize>(mean, Sum{}) / count;
  for (int part = lane; part < parts; part += kWarpSize) {
    const float shift = of_row[2 * part] - mean;
    squares += of_row[2 * part + 1] + count_of(part) * shift * shift;
  }
  const float rstd = rsqrtf(warp_reduce<kWarpSize>(squares, Sum{}) / count + call.eps);
  if (threadIdx.x == 0 && begin == 0) store_statistics(call, row, mean, rstd);
  normalise<T, VEC>(call, row, begin, end, nullptr, 0, mean, rstd);
}

template <class T, int VEC>
void launch_walk(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  if (plan.kernel == NormForwardPlan::Kernel::wide) {
    launch("norm_forward_wide_kernel", &norm_forward_wide_kernel<T, VEC>, dim3(static_cast<unsigned>(call.rows)), dim3(kWalkThreads),
           plan.shared_bytes, stream, call, plan.staged_vectors);
    return;
  }
  const dim3 grid(static_cast<unsigned>(call.rows * plan.splits));
  launch("norm_forward_parts_kernel", &norm_forward_parts_kernel<T, VEC>, grid, dim3(kWalkThreads), plan.shared_bytes, stream, call,
         plan.splits, plan.vectors_per_split);
  launch("norm_forward_apply_kernel", &norm_forward_apply_kernel<T, VEC>, grid, dim3(kWalkThreads), 0, stream, call, plan.splits,
         plan.vectors_per_split);
}

template <class T, int VEC, int CHUNKS>
void launch_rows(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.rows, plan.rows_per_block)));
  launch("norm_forward_rows_kernel", &norm_forward_rows_kernel<T, VEC, CHUNKS>, grid,
         dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows_per_block)), plan.shared_bytes, stream, call);
}

}  // namespace pytransformer::norm
