#include <pybind11/pybind11.h>

#include "platform/runtime.h"

namespace gpt1 {

void bind_platform(pybind11::module_& module) { module.doc() = "The CUDA kernels of gpt1_kernels."; }

}  // namespace gpt1
