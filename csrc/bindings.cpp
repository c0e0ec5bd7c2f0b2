// The launchers as Python functions: tensors as (address, extent), a stream as (device, handle).
#include <pybind11/pybind11.h>

#include "attention/attention.h"
#include "dropout/dropout.h"
#include "platform/runtime.h"

PYBIND11_MODULE(GPT1_KERNELS_MODULE, module) {
    using namespace gpt1;
    bind_platform(module);
    module.def("versions", &versions, "(driver, runtime): CUDA's, such as 13000; no driver is 0.");
    module.def("prepare", &prepare, "To be called once for a device before the first launch on it.");
    module.def("causal_attention_fwd", &causal_attention_fwd);
    module.def("causal_attention_bwd", &causal_attention_bwd);
    module.def("dropout_mask", &dropout_mask);
}
