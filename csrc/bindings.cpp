// The launchers as Python functions, which take tensors, and a stream as (device, stream).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/attention.h"
#include "column_sums/column_sums.h"
#include "dropout/dropout.h"
#include "embedding/embedding.h"
#include "ffn/ffn.h"
#include "layer_norm/layer_norm.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "matmul/matmul.h"
#include "platform/runtime.h"
#include "tensors.h"

PYBIND11_MODULE(GPT1_KERNELS_MODULE, module) {
    using namespace gpt1;
    bind_platform(module);
    module.def("versions", &versions, "(driver, runtime): CUDA's, such as 13000; no driver is 0.");
    module.def("prepare", &prepare, "To be called once for a device before the first launch on it.");
    module.def("causal_attention_bwd", &causal_attention_bwd);
    module.def("causal_attention_fwd", &causal_attention_fwd);
    module.def("column_sums", &column_sums);
    module.def("cross_entropy", &cross_entropy);
    module.def("dgelu_product", &dgelu_product);
    module.def("dropout_mask", &dropout_mask);
    module.def("embedding_bwd", &embedding_bwd);
    module.def("embedding_bwd_positions", &embedding_bwd_positions);
    module.def("embedding_fwd", &embedding_fwd);
    module.def("gelu_product", &gelu_product);
    module.def("layer_norm_bwd", &layer_norm_bwd);
    module.def("layer_norm_bwd_blocks", &layer_norm_bwd_blocks);
    module.def("layer_norm_fwd", &layer_norm_fwd);
    module.def("matmul", &matmul);
    module.def("scale_gradient", &scale_gradient);
    module.def("split_of_matmul", &split_of_matmul);
}
