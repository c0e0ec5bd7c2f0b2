// What a compiled module tells Python of itself, beside its kernels.
#pragma once

#include <utility>

namespace pybind11 {
class module_;
}

namespace gpt1 {

/// Called once for a device, before the first launch on it and not under graph capture.
void prepare(int device);

/// CUDA versions of the driver (0 without one) and of the runtime, such as 13000.
std::pair<int, int> versions();

/// Adds what only one of the two platforms has.
void bind_platform(pybind11::module_& module);

}  // namespace gpt1
