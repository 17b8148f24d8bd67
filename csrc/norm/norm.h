// LayerNorm and RMSNorm over rows: what the kernels are given.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace pytransformer {

enum class Type : int { float32, float16, bfloat16 };

struct NormForward {
  const void* x;         // (rows, cols), stride_x elements between rows
  const void* residual;  // likewise, or null
  const void* weight;    // (cols) or null
  const void* bias;      // (cols) or null
  void* y;               // (rows, cols), contiguous
  void* s;               // x + residual, contiguous; null without a residual
  float* mean;           // (rows); null for RMSNorm, or where not wanted
  float* rstd;           // (rows); null where not wanted
  int64_t rows, cols, stride_x, stride_residual;
  Type x_type, residual_type, weight_type, bias_type;
  float eps, weight_offset;
  bool is_rms;
};

void norm_forward(const NormForward& call, CUstream_st* stream);

}  // namespace pytransformer
