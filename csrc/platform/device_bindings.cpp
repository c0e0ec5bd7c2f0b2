#include <pybind11/pybind11.h>

#include "platform/device.h"
#include "platform/runtime.h"

namespace gpt1 {

namespace {

pybind11::list kernels() {
    using namespace pybind11::literals;
    pybind11::list all;
    for (const CompiledKernel& kernel : compiled_kernels()) {
        all.append(pybind11::dict("symbol"_a = kernel.symbol, "name"_a = kernel.name,
                                  "threads"_a = kernel.threads,
                                  "blocks_per_processor"_a = kernel.blocks_per_processor,
                                  "max_shared_bytes"_a = kernel.max_shared_bytes,
                                  "for_hopper"_a = kernel.for_hopper));
    }
    return all;
}

}  // namespace

void bind_platform(pybind11::module_& module) {
    module.doc() = "The CUDA kernels of gpt1_kernels.";
    module.def("capabilities", [] { return GPT1_KERNELS_CAPABILITIES; },
               "What nvcc compiled for, as in TORCH_CUDA_ARCH_LIST.");
    module.def("kernels", &kernels, "What each kernel was compiled for; needs no GPU.");
}

}  // namespace gpt1
