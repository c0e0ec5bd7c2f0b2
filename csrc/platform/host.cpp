#include "platform/module.h"

namespace gpt1 {

const char* const kModuleDoc =
    "The CUDA kernels of gpt1_kernels, compiled for a CPU: a tool for tests, and slow.";

std::pair<int, int> versions() { return {0, 0}; }

void prepare(int) {}

}  // namespace gpt1
