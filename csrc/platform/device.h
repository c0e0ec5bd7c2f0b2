// What the GPU's module knows of its kernels before it launches any.
#pragma once

#include <string>
#include <vector>

namespace gpt1 {

struct CompiledKernel {
    const void* entry;
    std::string symbol;  // its name in the objects and in ptxas' report
    const char* name;
    int threads, blocks_per_processor, max_shared_bytes;
    bool for_hopper;  // alone
};

/// Those of all sources, in no order.
std::vector<CompiledKernel>& compiled_kernels();

}  // namespace gpt1
