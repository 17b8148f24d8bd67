#pragma once

#include "../common/tensor.h"

namespace pytransformer {

void define_attention_ops(torch::stable::detail::StableLibrary& library);
void implement_attention_ops(torch::stable::detail::StableLibrary& library);

}  // namespace pytransformer
