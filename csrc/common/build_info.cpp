#include "build_info.h"

namespace pytransformer {

const char* const kVersion = PYT_VERSION;
const char* const kSourceId = PYT_SOURCE_ID;
const char* const kArchitectures = PYT_ARCHITECTURES;
const char* const kCudaVersion = PYT_CUDA_VERSION;
#ifdef PYT_EMULATED
const bool kIsEmulated = true;
#else
const bool kIsEmulated = false;
#endif

}  // namespace pytransformer
