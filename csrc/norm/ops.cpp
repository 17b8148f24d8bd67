#include "ops.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "norm.h"

namespace pytransformer {
namespace {

Type type_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::Half ? Type::float16 : Type::bfloat16;
}

// The one stride that walks dimensions begin..end in order; false if there is none.
bool fold(const Tensor& tensor, int64_t begin, int64_t end, int64_t& stride) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t span = 1;
  stride = 0;
  for (int64_t i = end - 1; i >= begin; --i) {
    if (sizes[i] == 1) continue;
    if (span == 1) {
      stride = strides[i];
    } else if (strides[i] != stride * span) {
      return false;
    }
    span *= sizes[i];
  }
  return true;
}

// A tensor whose rows are walked, and its strides once they are known.
struct Walked {
  Tensor* tensor;
  RowStrides* strides;
};

// Finds rows_per_group and strides with which all of the tensors can be walked: two are enough for a slice of heads out of a fused
// (batch, seqlen, 3 * num_heads, head_dim) projection. Tensors that no common walk fits are replaced by contiguous copies.
int64_t walk_rows(std::initializer_list<Walked> tensors, int64_t rows, int64_t cols) {
  const auto with_all = [&](auto holds) {
    for (const Walked& walked : tensors) {
      if (walked.tensor != nullptr && !holds(walked)) return false;
    }
    return true;
  };
  const auto contiguous = [&](const Walked& walked) {
    *walked.strides = {0, cols};
    return walked.tensor->is_contiguous();
  };
  if (with_all(contiguous)) return rows;
  with_all([&](const Walked& walked) {
    const int64_t last = walked.tensor->dim() - 1;
    if (cols > 1 && walked.tensor->stride(last) != 1) *walked.tensor = torch::stable::contiguous(*walked.tensor);
    return true;
  });
  const Tensor& first = *tensors.begin()->tensor;
  const int64_t leading = first.dim() - 1;
  for (int64_t split = 0; split < leading; ++split) {
    const auto folds = [&](const Walked& walked) {
      return fold(*walked.tensor, 0, split, walked.strides->group) && fold(*walked.tensor, split, leading, walked.strides->row);
    };
    if (!with_all(folds)) continue;
    int64_t rows_per_group = 1;
    for (int64_t i = split; i < leading; ++i) rows_per_group *= first.size(i);
    return rows_per_group;
  }
  with_all([&](const Walked& walked) {
    *walked.tensor = torch::stable::contiguous(*walked.tensor);
    *walked.strides = {0, cols};
    return true;
  });
  return rows;
}

void check_vector(const char* name, const OptionalTensor& vector, const Tensor& x, int64_t cols) {
  if (!vector) return;
  check_dtype(name, *vector);
  PYT_CHECK(vector->dim() == 1 && vector->size(0) == cols, name, " must have shape (", cols, "), got ", shape_of(*vector));
  check_same_device(name, *vector, x);
}

// A vector that is read element after element: itself, or a copy.
OptionalTensor in_order(OptionalTensor vector) {
  if (vector && !vector->is_contiguous()) vector = torch::stable::contiguous(*vector);
  return vector;
}

const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// (rows, cols)
std::pair<int64_t, int64_t> rows_and_cols(const Tensor& x) {
  check_dtype("x", x);
  PYT_CHECK(x.dim() > 0, "x must have at least 1 dimension");
  const int64_t cols = x.size(x.dim() - 1), numel = x.numel();
  const int64_t rows = numel == 0 ? 0 : numel / cols;
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  PYT_CHECK(rows <= most && cols <= most, "x must have fewer than 2^31 rows and columns, got ", rows, " x ", cols);
  return {rows, cols};
}

std::vector<int64_t> shape_without_last(const Tensor& x, int64_t count) {
  std::vector<int64_t> shape(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) shape[static_cast<size_t>(i)] = x.size(i);
  return shape;
}

struct Forward {
  Tensor y;
  OptionalTensor s, mean, rstd;
};

Forward forward(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, double eps, double weight_offset,
                bool is_rms, bool wants_statistics) {
  const auto [rows, cols] = rows_and_cols(x);
  check_vector("weight", weight, x, cols);
  check_vector("bias", bias, x, cols);
  if (residual) {
    check_dtype("residual", *residual);
    check_same_shape("residual", *residual, x);
    check_same_device("residual", *residual, x);
  }
  PYT_CHECK(std::isfinite(eps) && eps >= 0.0, "eps must be finite and at least 0, got ", eps);
  PYT_CHECK(std::isfinite(weight_offset), "weight_offset must be finite, got ", weight_offset);

  const std::vector<int64_t> shape = shape_without_last(x, x.dim());
  Forward results{empty(x, shape, x.scalar_type()), {}, {}, {}};
  if (residual) results.s = empty(x, shape, residual->scalar_type());
  if (wants_statistics) {
    const std::vector<int64_t> leading(shape.begin(), shape.end() - 1);
    results.rstd = empty(x, leading, ScalarType::Float);
    if (!is_rms) results.mean = empty(x, leading, ScalarType::Float);
  }
  if (rows == 0) return results;

  NormForward call{};
  call.rows_per_group =
      walk_rows({{&x, &call.x_strides}, {residual ? &*residual : nullptr, &call.residual_strides}}, rows, cols);
  weight = in_order(std::move(weight));
  bias = in_order(std::move(bias));
  call.x = x.const_data_ptr();
  call.residual = data_of(residual);
  call.weight = data_of(weight);
  call.bias = data_of(bias);
  call.y = results.y.mutable_data_ptr();
  call.s = residual ? results.s->mutable_data_ptr() : nullptr;
  call.mean = results.mean ? static_cast<float*>(results.mean->mutable_data_ptr()) : nullptr;
  call.rstd = results.rstd ? static_cast<float*>(results.rstd->mutable_data_ptr()) : nullptr;
  call.rows = rows;
  call.cols = cols;
  call.x_type = type_of(x);
  call.residual_type = residual ? type_of(*residual) : call.x_type;
  call.weight_type = weight ? type_of(*weight) : call.x_type;
  call.bias_type = bias ? type_of(*bias) : call.x_type;
  call.eps = static_cast<float>(eps);
  call.weight_offset = static_cast<float>(weight_offset);
  call.is_rms = is_rms;

  const LaunchScope scope(x);
  const NormForwardPlan plan = plan_norm_forward(call);
  OptionalTensor workspace;
  if (plan.workspace_floats > 0) {
    workspace = empty(x, {static_cast<int64_t>(plan.workspace_floats)}, ScalarType::Float);
    call.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
  norm_forward(call, plan, scope.stream());
  return results;
}

Tensor layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps) {
  return forward(std::move(x), std::move(weight), std::move(bias), {}, eps, 0.0, false, false).y;
}

Tensor rms_norm(Tensor x, OptionalTensor weight, double eps, double weight_offset) {
  return forward(std::move(x), std::move(weight), {}, {}, eps, weight_offset, true, false).y;
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, OptionalTensor weight, OptionalTensor bias, double eps) {
  Forward results = forward(std::move(x), std::move(weight), std::move(bias), std::move(residual), eps, 0.0, false, false);
  return {std::move(results.y), std::move(*results.s)};
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, OptionalTensor weight, double eps, double weight_offset) {
  Forward results = forward(std::move(x), std::move(weight), {}, std::move(residual), eps, weight_offset, true, false);
  return {std::move(results.y), std::move(*results.s)};
}

// What there is none of is an empty tensor, as an op returns a fixed number of tensors.
Tensor or_empty(OptionalTensor tensor, const Tensor& like) {
  return tensor ? std::move(*tensor) : empty(like, {0}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward_op(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                                           double eps, double weight_offset, bool is_rms) {
  Forward results =
      forward(x, std::move(weight), std::move(bias), std::move(residual), eps, weight_offset, is_rms, true);
  return {std::move(results.y), or_empty(std::move(results.s), x), or_empty(std::move(results.mean), x), std::move(*results.rstd)};
}

void check_statistics(const char* name, const Tensor& statistics, const Tensor& s) {
  PYT_CHECK(statistics.scalar_type() == ScalarType::Float, name, " must be float32, got ", name_of(statistics.scalar_type()));
  bool same = statistics.dim() == s.dim() - 1;
  for (int64_t i = 0; same && i < statistics.dim(); ++i) same = statistics.size(i) == s.size(i);
  PYT_CHECK(same, name, " must have the leading shape of s ", shape_of(s), ", got ", shape_of(statistics));
  PYT_CHECK(statistics.is_contiguous(), name, " must be contiguous");
  check_same_device(name, statistics, s);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_op(Tensor dy, OptionalTensor ds, Tensor s, OptionalTensor weight, Tensor mean,
                                                    Tensor rstd, double weight_offset, bool is_rms, bool wants_dweight,
                                                    std::optional<ScalarType> dbias_dtype) {
  const auto [rows, cols] = rows_and_cols(s);
  check_dtype("dy", dy);
  check_same_shape("dy", dy, s);
  check_same_device("dy", dy, s);
  if (ds) {
    PYT_CHECK(ds->scalar_type() == s.scalar_type(), "ds must have s's dtype ", name_of(s.scalar_type()), ", got ",
              name_of(ds->scalar_type()));
    check_same_shape("ds", *ds, s);
    check_same_device("ds", *ds, s);
  }
  check_vector("weight", weight, s, cols);
  if (!is_rms) check_statistics("mean", mean, s);
  check_statistics("rstd", rstd, s);
  PYT_CHECK(std::isfinite(weight_offset), "weight_offset must be finite, got ", weight_offset);
  PYT_CHECK(!dbias_dtype || is_floating_16_or_32(*dbias_dtype), "dbias_dtype must be float32, float16 or bfloat16");

  Tensor dx = empty(s, shape_without_last(s, s.dim()), s.scalar_type());
  OptionalTensor dweight, dbias;
  if (weight && wants_dweight) dweight = empty(s, {cols}, weight->scalar_type());
  if (dbias_dtype) dbias = empty(s, {cols}, *dbias_dtype);
  if (rows == 0) {
    if (dweight) torch::stable::zero_(*dweight);
    if (dbias) torch::stable::zero_(*dbias);
    return {std::move(dx), or_empty(std::move(dweight), s), or_empty(std::move(dbias), s)};
  }

  NormBackward call{};
  call.rows_per_group =
      walk_rows({{&s, &call.s_strides}, {&dy, &call.dy_strides}, {ds ? &*ds : nullptr, &call.ds_strides}}, rows, cols);
  weight = in_order(std::move(weight));
  call.dy = dy.const_data_ptr();
  call.ds = data_of(ds);
  call.s = s.const_data_ptr();
  call.weight = data_of(weight);
  call.mean = is_rms ? nullptr : static_cast<const float*>(mean.const_data_ptr());
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.dx = dx.mutable_data_ptr();
  call.dweight = dweight ? dweight->mutable_data_ptr() : nullptr;
  call.dbias = dbias ? dbias->mutable_data_ptr() : nullptr;
  call.rows = rows;
  call.cols = cols;
  call.dy_type = type_of(dy);
  call.s_type = type_of(s);
  call.weight_type = weight ? type_of(*weight) : call.s_type;
  call.dbias_type = dbias ? type_of(*dbias) : call.s_type;
  call.weight_offset = static_cast<float>(weight_offset);

  const LaunchScope scope(s);
  const NormBackwardPlan plan = plan_norm_backward(call);
  OptionalTensor workspace;
  if (plan.workspace_floats > 0) {
    workspace = empty(s, {static_cast<int64_t>(plan.workspace_floats)}, ScalarType::Float);
    call.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
  norm_backward(call, plan, scope.stream());
  return {std::move(dx), or_empty(std::move(dweight), s), or_empty(std::move(dbias), s)};
}

}  // namespace

void define_norm_ops(torch::stable::detail::StableLibrary& library) {
  // For inference: as few arguments and results as each case has, as every one costs the caller time.
  library.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset) -> Tensor");
  library.def("add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  library.def("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset) -> (Tensor, Tensor)");
  // For training: pytransformer::norm_forward and norm_backward.
  library.def(
      "norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float weight_offset, bool is_rms)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, float weight_offset, bool is_rms, "
      "bool want_dweight, ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)");
}

void implement_norm_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("norm_forward", TORCH_BOX(&norm_forward_op));
  library.impl("norm_backward", TORCH_BOX(&norm_backward_op));
}

}  // namespace pytransformer
