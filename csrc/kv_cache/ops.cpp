#include "ops.h"

namespace pytransformer {

void define_kv_append_ops(torch::stable::detail::StableLibrary&) {}

void implement_kv_append_ops(torch::stable::detail::StableLibrary&) {}

}  // namespace pytransformer
