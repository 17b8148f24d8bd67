#pragma once

#include "../common/tensor.h"

namespace pytransformer {

void define_kv_append_ops(torch::stable::detail::StableLibrary& library);
void implement_kv_append_ops(torch::stable::detail::StableLibrary& library);

}  // namespace pytransformer
