// What Python hands to a launcher: plain types, without CUDA, so that bindings.cpp needs none.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace gpt1 {

/// The types of elements.
enum DType : int { kFloat32, kBFloat16, kFloat16 };

/// A tensor: its address, and how many elements lie from its first to its last. Both 0 if absent.
struct Array {
    std::uintptr_t address = 0;
    std::int64_t extent = 0;
};

/// Where to launch: a device's index and a cudaStream_t.
using Stream = std::pair<int, std::uintptr_t>;

/// A tensor and its DType, where that is not the activations'.
struct TypedArray {
    Array array;
    DType dtype = kFloat32;
};

/// "N=5, C=768": names and values in turn, for the messages of errors.
template <class... Parts>
std::string shape_text(const Parts&... parts) {
    std::ostringstream text;
    int count = 0;
    ((text << (count == 0 ? "" : count % 2 == 0 ? ", " : "=") << parts, ++count), ...);
    return text.str();
}

/// The number of blocks of a launch; throws beyond CUDA's limit.
template <class Kernel>
unsigned checked_grid(std::int64_t grid, const typename Kernel::Params& params) {
    // The smallest chips hold 1536 threads to a multiprocessor.
    static_assert(Kernel::kThreads * Kernel::kBlocksPerProcessor <= 1536);
    if (grid < 1 || grid > 0x7fffffff) {
        throw std::invalid_argument(std::string(Kernel::kName) + " (" + params.shape() + "): " +
                                    std::to_string(grid) + " blocks, expected 1 to 2^31 - 1");
    }
    return static_cast<unsigned>(grid);
}

}  // namespace gpt1
