// What bindings.cpp exposes besides the kernels: device.cu has it for a GPU, host.cpp for a CPU.
#pragma once

#include <utility>

namespace gpt1 {

extern const char* const kModuleDoc;

// (driver, runtime), such as 13000 for CUDA 13.0; the driver is 0 where there is none.
std::pair<int, int> versions();

// Called once per device, before the first kernel on it. Throws std::runtime_error without a GPU.
void prepare(int device);

}  // namespace gpt1
