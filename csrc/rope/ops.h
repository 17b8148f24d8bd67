#pragma once

#include "../common/tensor.h"

namespace pytransformer {

void define_rope_ops(torch::stable::detail::StableLibrary& library);
void implement_rope_ops(torch::stable::detail::StableLibrary& library);

}  // namespace pytransformer
