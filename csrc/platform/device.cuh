// The primitives on a GPU. See platform.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>
#include <typeinfo>

#include "platform/device.h"
#include "platform/types.h"

namespace gpt1 {

using bf16 = __nv_bfloat16;
using fp16 = __half;

/// Where a primitive is called from, of interest to the CPU's version only.
struct Site {
    __device__ static constexpr Site current() { return {}; }
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T values[N];
    __device__ __forceinline__ T& operator[](int i) { return values[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

struct Pair {
    float low, high;
};

template <class To, class From>
__device__ __forceinline__ To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

/// N elements of type T in registers, as what CUDA loads and stores with one instruction.
template <class T, int N>
using WordsOf = std::conditional_t<N * sizeof(T) == 16, uint4,
                                   std::conditional_t<N * sizeof(T) == 8, uint2, std::uint32_t>>;

// --- indices ---------------------------------------------------------------------------------------

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ std::int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ std::int64_t grid_size() { return gridDim.x; }

// --- barriers and collectives ----------------------------------------------------------------------

__device__ __forceinline__ void barrier(Site = Site::current()) { __syncthreads(); }
__device__ __forceinline__ void warp_barrier(Site = Site::current()) { __syncwarp(); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, Site = Site::current()) {
    return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask, Site = Site::current()) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// --- memory ----------------------------------------------------------------------------------------

template <class T>
class Global {
public:
    Global() = default;
    explicit Global(Array array) : data_(reinterpret_cast<T*>(array.address)) {}

    __host__ __device__ __forceinline__ explicit operator bool() const { return data_ != nullptr; }

    __device__ __forceinline__ std::remove_const_t<T> load(
        std::int64_t i, bool mask = true, Site = Site::current()) const {
        return mask ? data_[i] : std::remove_const_t<T>(0.0f);
    }

    __device__ __forceinline__ void store(
        std::int64_t i, std::type_identity_t<T> value, bool mask = true, Site = Site::current()) const {
        if (mask) data_[i] = value;
    }

    template <int N>
    __device__ __forceinline__ Vector<std::remove_const_t<T>, N> load_vector(
        std::int64_t i, bool mask = true, Site = Site::current()) const {
        // As words: the compiler would give each 2-byte element of a vector a register of its own where the
        // zeros of a masked-out load come in, and so wait for the load right there.
        WordsOf<T, N> words{};
        if (mask) words = *reinterpret_cast<const WordsOf<T, N>*>(data_ + i);
        return same_bits<Vector<std::remove_const_t<T>, N>>(words);
    }

    template <int N>
    __device__ __forceinline__ void store_vector(
        std::int64_t i, const Vector<T, N>& value, bool mask = true, Site = Site::current()) const {
        // An assignment may become a store for each word; the intrinsic is one store, with the usual
        // write-back caching.
        if (mask) __stwb(reinterpret_cast<WordsOf<T, N>*>(data_ + i), same_bits<WordsOf<T, N>>(value));
    }

    __device__ __forceinline__ T* address(std::int64_t i) const { return data_ + i; }

private:
    T* data_ = nullptr;
};

template <class T>
class Shared {
public:
    __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}

    __device__ __forceinline__ T load(int i, bool mask = true, Site = Site::current()) const {
        return mask ? data_[i] : T(0.0f);
    }

    __device__ __forceinline__ void store(int i, T value, bool mask = true, Site = Site::current()) const {
        if (mask) data_[i] = value;
    }

    template <int N>
    __device__ __forceinline__ Vector<T, N> load_vector(
        int i, bool mask = true, Site = Site::current()) const {
        WordsOf<T, N> words{};
        if (mask) words = *reinterpret_cast<const WordsOf<T, N>*>(data_ + i);
        return same_bits<Vector<T, N>>(words);
    }

    template <int N>
    __device__ __forceinline__ void store_vector(
        int i, const Vector<T, N>& value, bool mask = true, Site = Site::current()) const {
        if (mask) *reinterpret_cast<WordsOf<T, N>*>(data_ + i) = same_bits<WordsOf<T, N>>(value);
    }

    /// The `count` elements from `first` on.
    __device__ __forceinline__ Shared slice(int first, int) const { return Shared(data_ + first); }

    __device__ __forceinline__ unsigned address(int i) const {
        return static_cast<unsigned>(__cvta_generic_to_shared(data_ + i));
    }

private:
    T* data_;
};

extern __shared__ __align__(1024) unsigned char shared_bytes_of_block[];

/// Hands out the block's shared memory, in the same order in every thread.
class SharedArena {
public:
    template <class T>
    __device__ __forceinline__ Shared<T> take(int count) {
        T* data = reinterpret_cast<T*>(shared_bytes_of_block + used_);
        used_ += (count * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
        return Shared<T>(data);
    }

private:
    int used_ = 0;
};

template <class T>
__device__ __forceinline__ void copy_async(
    const Shared<std::remove_const_t<T>>& to, int i, const Global<T>& from, std::int64_t j,
    bool mask = true, Site = Site::current()) {
    // With a source size of 0 nothing is read, wherever the address is, and 16 zero bytes are written.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to.address(i)),
                 "l"(from.address(j)), "r"(mask ? 16 : 0)
                 : "memory");
}

template <class T>
__device__ __forceinline__ void copy_async_word(
    const Shared<std::remove_const_t<T>>& to, int i, const Global<T>& from, std::int64_t j,
    bool mask = true, Site = Site::current()) {
    static_assert(sizeof(T) == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to.address(i)),
                 "l"(from.address(j)), "r"(mask ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kOpenGroups>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kOpenGroups) : "memory");
}

/// Stores `desired` where `expected` is; gives what was there.
__device__ __forceinline__ std::int64_t compare_exchange(
    const Global<std::int64_t>& memory, std::int64_t i, std::int64_t expected, std::int64_t desired,
    Site = Site::current()) {
    return atomicCAS_system(reinterpret_cast<unsigned long long*>(memory.address(i)),
                            static_cast<unsigned long long>(expected),
                            static_cast<unsigned long long>(desired));
}

// --- numbers ---------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

/// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
    else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
    else return x;
}

/// Two elements of 2 bytes in a register, `low` first in memory.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) return same_bits<std::uint32_t>(__floats2bfloat162_rn(low, high));
    else return same_bits<std::uint32_t>(__floats2half2_rn(low, high));
}

template <class T>
__device__ __forceinline__ Pair unpack(std::uint32_t word) {
    if constexpr (std::is_same_v<T, bf16>) {
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    } else {
        const float2 pair = __half22float2(same_bits<__half2>(word));
        return {pair.x, pair.y};
    }
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// A product of 64 bits in one instruction: of a plain one, ptxas adds the upper half to zero besides.
__device__ __forceinline__ std::uint64_t multiply_wide(std::uint32_t a, std::uint32_t b) {
    std::uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
}

// --- matrices --------------------------------------------------------------------------------------

struct FragmentA {
    std::uint32_t words[4];  // (16, 16): rows lane / 4 and + 8, columns 2 (lane % 4) and + 8
};
struct FragmentB {
    std::uint32_t words[2];  // (16, 8): rows 2 (lane % 4) and + 8, column lane / 4
};
struct FragmentC {
    float values[4];  // (16, 8): rows lane / 4 and + 8, columns 2 (lane % 4) and + 1
};

/// Lane l gives the first element of row l % 8 of matrix l / 8; it gets elements 2 (l % 4) and + 1
/// of row l / 4 of each matrix.
template <class T>
__device__ __forceinline__ Vector<std::uint32_t, 4> load_matrices(
    const Shared<T>& memory, int i, Site = Site::current()) {
    Vector<std::uint32_t, 4> m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(memory.address(i))
                 : "memory");
    return m;
}

/// The same of the matrices' transposes.
template <class T>
__device__ __forceinline__ Vector<std::uint32_t, 4> load_matrices_transposed(
    const Shared<T>& memory, int i, Site = Site::current()) {
    Vector<std::uint32_t, 4> m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(memory.address(i))
                 : "memory");
    return m;
}

template <class T>
__device__ __forceinline__ void mma(
    FragmentC& c, const FragmentA& a, const FragmentB& b, Site = Site::current()) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
            : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
              "r"(b.words[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
            : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
              "r"(b.words[1]));
    }
}

// --- launch ----------------------------------------------------------------------------------------

/// Makes a device current, and restores the one before it when destroyed.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

private:
    int previous_ = -1;
};

void throw_launch_error(const char* kernel, const std::string& shape, cudaError_t error);

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerProcessor)
    entry(const __grid_constant__ typename Kernel::Params params) {
    Kernel::run(params);
}

/// Lists a kernel among those of the module, once it is loaded.
template <class Kernel>
struct Registered {
    static CompiledKernel describe() {
        // The mangled names of this type and of entry<Kernel> differ in how they begin and end alone.
        const std::string type = typeid(Registered).name(), arguments = type.substr(type.find('I'));
        return {reinterpret_cast<const void*>(&entry<Kernel>),
                "_ZN4gpt15entry" + arguments + "vNT_6ParamsE",
                Kernel::kName,
                Kernel::kThreads,
                Kernel::kBlocksPerProcessor,
                Kernel::kMaxSharedBytes,
                requires { Kernel::kForHopper; }};
    }
    static inline const bool done = (compiled_kernels().push_back(describe()), true);
};

/// Starts a kernel on a stream; does not wait for it.
template <class Kernel>
void launch(std::int64_t grid, int shared_bytes, Stream stream, const typename Kernel::Params& params) {
    static_cast<void>(&Registered<Kernel>::done);  // without a use it would not be initialised
    const CurrentDevice current(stream.first);
    cudaLaunchConfig_t config{};
    config.gridDim = checked_grid<Kernel>(grid, params);
    config.blockDim = Kernel::kThreads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream.second);
    cudaLaunchAttribute cluster{};
    if constexpr (requires { Kernel::kCluster; }) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {Kernel::kCluster, 1, 1};
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, entry<Kernel>, params);
    if (error != cudaSuccess) throw_launch_error(Kernel::kName, params.shape(), error);
}

/// The number of multiprocessors of a device.
int processors(int device);

/// Whether a device runs the kernels that are compiled for Hopper alone.
bool is_hopper(int device);

/// The bytes of shared memory that a block of a device may ask for.
int shared_memory_limit(int device);

}  // namespace gpt1
