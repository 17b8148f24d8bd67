#pragma once

#include "../common/tensor.h"

namespace pytransformer {

void define_norm_ops(torch::stable::detail::StableLibrary& library);
void implement_norm_ops(torch::stable::detail::StableLibrary& library);

}  // namespace pytransformer
