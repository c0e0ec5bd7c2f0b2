#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "platform/module.h"

namespace gpt1 {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

}  // namespace

const char* const kModuleDoc = "Kernels of gpt1_kernels for NVIDIA GPUs.";

std::pair<int, int> versions() {
  int driver = 0;
  int runtime = 0;
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  return {driver, runtime};
}

void prepare(int device) {
  int current = 0;
  check(cudaGetDevice(&current));
  check(cudaSetDevice(device));
  check(cudaSetDevice(current));
}

}  // namespace gpt1
