// LayerNorm and RMSNorm over rows: what the kernels are given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/element_type.h"

struct CUstream_st;

namespace pytransformer {

// Row r of a tensor begins at element (r / rows_per_group) * group + (r % rows_per_group) * row.
struct RowStrides {
  int64_t group, row;
};

struct NormForward {
  const void* x;         // (rows, cols)
  const void* residual;  // likewise, or null
  const void* weight;    // (cols) or null
  const void* bias;      // (cols) or null
  void* y;               // (rows, cols), contiguous
  void* s;               // x + residual, contiguous, in residual's type; null without a residual
  float* mean;           // (rows); null where not wanted
  float* rstd;           // (rows); null where not wanted
  float* workspace;      // what the plan asks for
  int64_t rows, cols, rows_per_group;
  RowStrides x_strides, residual_strides;
  ElementType x_type, residual_type, weight_type, bias_type;
  float eps, weight_offset;
  bool is_rms;
};

// How a forward call is spread over the GPU.
struct NormForwardPlan {
  enum class Kernel { rows, wide, split } kernel;
  int vector_length;   // elements per access
  int chunks;          // rows: vectors per thread
  int threads;         // per row (rows), per block (else)
  int rows_per_block;  // rows
  int splits;          // split: blocks per row
  int vectors_per_split;
  int staged_vectors;  // wide: how many of a row's vectors stay in shared memory
  size_t shared_bytes;
  size_t workspace_floats;
};

NormForwardPlan plan_norm_forward(const NormForward& call);
void norm_forward(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream);

struct NormBackward {
  const void* dy;      // (rows, cols)
  const void* ds;      // gradient of the returned sum, in s's type; or null
  const void* s;       // (rows, cols): what was normalised
  const void* weight;  // (cols) or null
  const float* mean;   // (rows); null for RMSNorm
  const float* rstd;   // (rows)
  void* dx;            // (rows, cols), contiguous, in s's type
  void* dweight;       // (cols) in weight's type; null where not wanted
  void* dbias;         // (cols); null where not wanted
  float* workspace;    // what the plan asks for
  int64_t rows, cols, rows_per_group;
  RowStrides dy_strides, ds_strides, s_strides;
  ElementType dy_type, s_type, weight_type, dbias_type;
  float weight_offset;
};

struct NormBackwardPlan {
  bool whole_rows;  // a block holds its row; else the row's sums are computed first, and blocks of columns follow
  int vector_length;
  int chunks;          // whole_rows: vectors per thread
  int threads;         // per row (whole_rows), per block (else)
  int rows_per_block;  // whole_rows
  int programs;        // blocks that share the rows: each writes one partial row of dweight and dbias
  int splits;          // else: blocks per row that compute its sums
  int vectors_per_split;
  size_t shared_bytes;
  size_t partial_floats;  // offset of dbias's partial rows in the workspace, and of the row sums at twice that
  size_t workspace_floats;
};

NormBackwardPlan plan_norm_backward(const NormBackward& call);
void norm_backward(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream);

// One dtype of x (forward) or of s (backward) each, compiled on its own (*_instances.cu).
template <class T>
void launch_norm_forward(const NormForward& call, const NormForwardPlan& plan, CUstream_st* stream);
template <class T>
void launch_norm_backward(const NormBackward& call, const NormBackwardPlan& plan, CUstream_st* stream);

}  // namespace pytransformer
