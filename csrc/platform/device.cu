// What the GPU's platform does on the host's side of a launch.
#include "platform/platform.cuh"
#include "platform/runtime.h"

namespace gpt1 {

namespace {

/// Throws an error and clears it, so that the next caller of cudaGetLastError does not find it.
[[noreturn]] void throw_error(const std::string& call, cudaError_t error) {
    cudaGetLastError();
    throw std::runtime_error(call + ": " + cudaGetErrorString(error));
}

void check(cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw_error(call, error);
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

}  // namespace

CurrentDevice::CurrentDevice(int device) {
    // A thread that has launched nothing has no context, which the driver needs to make tensor maps;
    // cudaGetDevice does not create one.
    static thread_local bool has_context = false;
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current == device && has_context) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    has_context = true;
    if (current != device) previous_ = current;
}

CurrentDevice::~CurrentDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
}

std::vector<CompiledKernel>& compiled_kernels() {
    static std::vector<CompiledKernel> all;
    return all;
}

void throw_launch_error(const char* kernel, const std::string& shape, cudaError_t error) {
    throw_error(std::string(kernel) + " (" + shape + ")", error);
}

int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

bool is_hopper(int device) {
    return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
           attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

int shared_memory_limit(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

void prepare(int device) {
    const CurrentDevice current(device);
    for (const CompiledKernel& kernel : compiled_kernels()) {
        if (kernel.for_hopper && !is_hopper(device)) continue;
        // A kernel for larger chips stays unprepared here, and its launcher does not choose it.
        const cudaError_t error = cudaFuncSetAttribute(
            kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.max_shared_bytes);
        if (error == cudaErrorInvalidValue) cudaGetLastError();
        else check(error, "cudaFuncSetAttribute");
    }
}

std::pair<int, int> versions() {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
    return {driver, runtime};
}

}  // namespace gpt1
