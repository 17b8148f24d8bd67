// Element types as the kernels' structs name them. No CUDA, no torch.
#pragma once

namespace pytransformer {

enum class ElementType : int { float32, float16, bfloat16, int8, float8_e4m3fn };

}  // namespace pytransformer
