#include "ops.h"

namespace pytransformer {

void define_rope_ops(torch::stable::detail::StableLibrary&) {}

void implement_rope_ops(torch::stable::detail::StableLibrary&) {}

}  // namespace pytransformer
