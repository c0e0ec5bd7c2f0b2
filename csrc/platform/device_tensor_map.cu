// TMA's tensor maps, which the driver makes: its function is looked up at first use, so nothing links it.
#include <cudaTypedefs.h>

#include "platform/hopper.cuh"

namespace gpt1 {

namespace {

PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
    constexpr const char* kName = "cuTensorMapEncodeTiled";
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        const std::string reason = error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error);
        throw std::runtime_error(std::string(kName) + ": not in the driver" + reason);
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

TensorMap tensor_map(std::uintptr_t data, bool is_bf16, std::int64_t rows, std::int64_t columns,
                     std::int64_t stride, int box_rows) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
    constexpr std::int64_t kBytes = 2;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * kBytes)};
    const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
    TensorMap made;
    const CUresult result = encode(
        &made.map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        reinterpret_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error(
            "cuTensorMapEncodeTiled: error " + std::to_string(result) + " for " +
            shape_text("rows", rows, "columns", columns, "stride", stride, "box_rows", box_rows));
    }
    return made;
}

}  // namespace gpt1
