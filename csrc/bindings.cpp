// The Python module: `_cuda`, or `_cuda_host` where the same kernels are compiled for a CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "platform/module.h"

PYBIND11_MODULE(GPT1_KERNELS_MODULE, module) {
  module.doc() = gpt1::kModuleDoc;
  module.def("versions", &gpt1::versions,
             "(driver, runtime), such as 13000 for CUDA 13.0; the driver is 0 where there is none.");
  module.def("prepare", &gpt1::prepare, pybind11::arg("device"),
             "Called once per device, before the first kernel on it.");
}
