#include "ops.h"

namespace pytransformer {

void define_decode_attention_ops(torch::stable::detail::StableLibrary&) {}

void implement_decode_attention_ops(torch::stable::detail::StableLibrary&) {}

}  // namespace pytransformer
