#include "ops.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "norm.h"

namespace pytransformer {
namespace {

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

void check_vector(const char* name, const OptionalFacts& vector, const Facts& x) {
  if (!vector) return;
  check_floating(name, *vector);
  check_shape(name, *vector, {x.size(-1)});
  check_device(name, *vector, x);
}

// A vector that is read element after element: itself, or a copy.
OptionalTensor in_order(OptionalTensor vector) {
  if (vector && !vector->is_contiguous()) vector = torch::stable::contiguous(*vector);
  return vector;
}

const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* pointer_of(const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

ElementType type_or(const OptionalFacts& tensor, ScalarType otherwise) { return element_type(tensor ? tensor->type : otherwise); }

// (rows, cols)
std::pair<int64_t, int64_t> rows_and_cols(const Facts& x) {
  check_floating("x", x);
  PYT_CHECK(x.dim > 0, "x must have at least 1 dimension");
  const int64_t cols = x.size(-1), numel = x.tensor.numel();
  const int64_t rows = numel == 0 ? 0 : numel / cols;
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  PYT_CHECK(rows <= most && cols <= most, "x must have fewer than 2^31 rows and columns, got ", rows, " x ", cols);
  return {rows, cols};
}

struct Forward {
  Tensor y;
  OptionalTensor s, mean, rstd;
};

Forward forward(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, double eps, double weight_offset,
                bool is_rms, bool wants_statistics) {
  // Of what was given: shape and strides hold until walk_rows puts a copy in its place, dtype and device for good.
  const Facts given(x);
  const OptionalFacts given_weight = facts_of(weight), given_bias = facts_of(bias), given_residual = facts_of(residual);
  const auto [rows, cols] = rows_and_cols(given);
  check_vector("weight", given_weight, given);
  check_vector("bias", given_bias, given);
  if (residual) {
    check_floating("residual", *given_residual);
    check_shape("residual", *given_residual, given.shape);
    check_device("residual", *given_residual, given);
  }
  PYT_CHECK(std::isfinite(eps) && eps >= 0.0, "eps must be finite and at least 0, got ", eps);
  PYT_CHECK(std::isfinite(weight_offset), "weight_offset must be finite, got ", weight_offset);

  Forward results{empty(given, given.shape, given.type), {}, {}, {}};
  if (residual) results.s = empty(given, given.shape, given_residual->type);
  if (wants_statistics) {
    results.rstd = empty(given, given.shape.leading(), ScalarType::Float);
    if (!is_rms) results.mean = empty(given, given.shape.leading(), ScalarType::Float);
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
  call.s = pointer_of(results.s);
  call.mean = static_cast<float*>(pointer_of(results.mean));
  call.rstd = static_cast<float*>(pointer_of(results.rstd));
  call.rows = rows;
  call.cols = cols;
  call.x_type = element_type(given.type);
  call.residual_type = type_or(given_residual, given.type);
  call.weight_type = type_or(given_weight, given.type);
  call.bias_type = type_or(given_bias, given.type);
  call.eps = static_cast<float>(eps);
  call.weight_offset = static_cast<float>(weight_offset);
  call.is_rms = is_rms;

  const LaunchScope scope(x);
  const NormForwardPlan plan = plan_norm_forward(call);
  OptionalTensor workspace;
  if (plan.workspace_floats > 0) {
    workspace = empty(given, {static_cast<int64_t>(plan.workspace_floats)}, ScalarType::Float);
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
Tensor or_empty(OptionalTensor tensor, const Facts& like) {
  return tensor ? std::move(*tensor) : empty(like, {0}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward_op(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                                           double eps, double weight_offset, bool is_rms) {
  Forward results =
      forward(x, std::move(weight), std::move(bias), std::move(residual), eps, weight_offset, is_rms, true);
  const Facts like(x);
  return {std::move(results.y), or_empty(std::move(results.s), like), or_empty(std::move(results.mean), like), std::move(*results.rstd)};
}

void check_statistics(const char* name, const Facts& statistics, const Facts& s) {
  check_type(name, statistics, ScalarType::Float);
  PYT_CHECK(statistics.shape == s.shape.leading(), name, " must have the leading shape of s ", s.shape.text(), ", got ",
            statistics.shape.text());
  check_contiguous(name, statistics);
  check_device(name, statistics, s);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_op(Tensor dy, OptionalTensor ds, Tensor s, OptionalTensor weight, Tensor mean,
                                                    Tensor rstd, double weight_offset, bool is_rms, bool wants_dweight,
                                                    std::optional<ScalarType> dbias_dtype) {
  const Facts given(s), given_dy(dy);
  const OptionalFacts given_ds = facts_of(ds), given_weight = facts_of(weight);
  const auto [rows, cols] = rows_and_cols(given);
  check_floating("dy", given_dy);
  check_shape("dy", given_dy, given.shape);
  check_device("dy", given_dy, given);
  if (ds) {
    PYT_CHECK(given_ds->type == given.type, "ds must have s's dtype ", name_of(given.type), ", got ", name_of(given_ds->type));
    check_shape("ds", *given_ds, given.shape);
    check_device("ds", *given_ds, given);
  }
  check_vector("weight", given_weight, given);
  if (!is_rms) check_statistics("mean", Facts(mean), given);
  check_statistics("rstd", Facts(rstd), given);
  PYT_CHECK(std::isfinite(weight_offset), "weight_offset must be finite, got ", weight_offset);
  PYT_CHECK(!dbias_dtype || is_floating_16_or_32(*dbias_dtype), "dbias_dtype must be float32, float16 or bfloat16");

  Tensor dx = empty(given, given.shape, given.type);
  OptionalTensor dweight, dbias;
  if (weight && wants_dweight) dweight = empty(given, {cols}, given_weight->type);
  if (dbias_dtype) dbias = empty(given, {cols}, *dbias_dtype);
  if (rows == 0) {
    if (dweight) torch::stable::zero_(*dweight);
    if (dbias) torch::stable::zero_(*dbias);
    return {std::move(dx), or_empty(std::move(dweight), given), or_empty(std::move(dbias), given)};
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
  call.dweight = pointer_of(dweight);
  call.dbias = pointer_of(dbias);
  call.rows = rows;
  call.cols = cols;
  call.dy_type = element_type(given_dy.type);
  call.s_type = element_type(given.type);
  call.weight_type = type_or(given_weight, given.type);
  call.dbias_type = element_type(dbias_dtype.value_or(given.type));
  call.weight_offset = static_cast<float>(weight_offset);

  const LaunchScope scope(s);
  const NormBackwardPlan plan = plan_norm_backward(call);
  OptionalTensor workspace;
  if (plan.workspace_floats > 0) {
    workspace = empty(given, {static_cast<int64_t>(plan.workspace_floats)}, ScalarType::Float);
    call.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
  norm_backward(call, plan, scope.stream());
  return {std::move(dx), or_empty(std::move(dweight), given), or_empty(std::move(dbias), given)};
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
