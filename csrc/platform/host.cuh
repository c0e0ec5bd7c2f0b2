// The primitives on a CPU, for tests: the same names, and everything checked. See platform.cuh.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "platform/host_block.h"
#include "platform/host_memory.h"
#include "platform/types.h"

#define __device__
#define __host__
#define __forceinline__ inline

namespace gpt1 {

// --- numbers ---------------------------------------------------------------------------------------

/// The upper half of a float.
struct bf16 {
    std::uint16_t bits;
    bf16() = default;
    explicit bf16(float x);
};

/// IEEE 754 binary16.
struct fp16 {
    std::uint16_t bits;
    fp16() = default;
    explicit fp16(float x);
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }
float to_float(fp16 x);

template <class T>
T from_float(float x) {
    return T(x);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T values[N];
    T& operator[](int i) { return values[i]; }
    const T& operator[](int i) const { return values[i]; }
};

struct Pair {
    float low, high;
};

template <class T>
std::uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | std::uint32_t{from_float<T>(high).bits} << 16;
}

template <class T>
Pair unpack(std::uint32_t word) {
    T low, high;
    low.bits = word & 0xffff;
    high.bits = word >> 16;
    return {to_float(low), to_float(high)};
}

using std::max;
using std::min;

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline std::uint64_t multiply_wide(std::uint32_t a, std::uint32_t b) { return std::uint64_t{a} * b; }

// --- indices ---------------------------------------------------------------------------------------

inline int thread_index() { return host::thread->index; }
inline int lane_index() { return host::thread->index % host::kLanes; }
inline int warp_index() { return host::thread->index / host::kLanes; }
inline std::int64_t block_index() { return host::block->index; }
inline std::int64_t grid_size() { return host::block->grid; }

// --- barriers and collectives ----------------------------------------------------------------------

inline void barrier(Site site = Site::current()) { host::wait_at_barrier(site); }

inline void warp_barrier(Site site = Site::current()) {
    host::collective("warp_barrier", site, [](host::Slot*) { ++host::warp().epoch; });
}

namespace host {

/// Gives a value to `combine` in the lane's slot.
template <class In>
void give(const char* name, const Site& site, const In& in, void (*combine)(Slot*)) {
    static_assert(sizeof(In) <= kSlotBytes);
    std::memcpy(warp().slots[lane()].in, &in, sizeof(In));
    collective(name, site, combine);
}

/// And takes one.
template <class Out, class In>
Out exchange(const char* name, const Site& site, const In& in, void (*combine)(Slot*)) {
    static_assert(sizeof(Out) <= kSlotBytes);
    give(name, site, in, combine);
    Out out;
    std::memcpy(&out, warp().slots[lane()].out, sizeof(Out));
    return out;
}

template <class T>
const T& given(const Slot& slot) {
    return *reinterpret_cast<const T*>(slot.in);
}

template <class T>
T& taken(Slot& slot) {
    return *reinterpret_cast<T*>(slot.out);
}

template <class T>
struct Addressed {
    T value;
    int lane;
};

}  // namespace host

template <class T>
T shuffle(T value, int lane, Site site = Site::current()) {
    using In = host::Addressed<T>;
    return host::exchange<T>("shuffle", site, In{value, lane}, [](host::Slot* slots) {
        for (int i = 0; i < host::kLanes; ++i) {
            const int from = host::given<In>(slots[i]).lane % host::kLanes;
            host::taken<T>(slots[i]) = host::given<In>(slots[from]).value;
        }
    });
}

template <class T>
T shuffle_xor(T value, int mask, Site site = Site::current()) {
    return gpt1::shuffle(value, lane_index() ^ mask, site);  // not std::shuffle, which Site would find
}

// --- memory ----------------------------------------------------------------------------------------

namespace host {

/// What the two kinds of views share.
template <class T, Space kSpace>
class View {
public:
    using Value = std::remove_const_t<T>;

    Value load(std::int64_t i, bool mask = true, Site site = Site::current()) const {
        check(access(Kind::kRead, i, 1, mask), site);
        return mask ? data_[i] : Value(0.0f);
    }

    void store(std::int64_t i, std::type_identity_t<T> value, bool mask = true,
               Site site = Site::current()) const {
        check(access(Kind::kWrite, i, 1, mask), site);
        if (mask) data_[i] = value;
    }

    template <int N>
    Vector<Value, N> load_vector(std::int64_t i, bool mask = true, Site site = Site::current()) const {
        check(access(Kind::kRead, i, N, mask), site);
        Vector<Value, N> value;
        if (mask) std::memcpy(&value, data_ + i, sizeof(value));
        else std::fill_n(value.values, N, Value(0.0f));
        return value;
    }

    template <int N>
    void store_vector(std::int64_t i, const Vector<Value, N>& value, bool mask = true,
                      Site site = Site::current()) const {
        check(access(Kind::kWrite, i, N, mask), site);
        if (mask) std::memcpy(data_ + i, &value, sizeof(value));
    }

    Access access(Kind kind, std::int64_t i, int count, bool mask) const {
        return {kSpace, kind, data_, i, extent_, count, sizeof(T), !mask};
    }

protected:
    View(T* data, std::int64_t extent) : data_(data), extent_(extent) {}

    T* data_;
    std::int64_t extent_;
};

}  // namespace host

template <class T>
class Global : public host::View<T, host::Space::kGlobal> {
    using View = host::View<T, host::Space::kGlobal>;

public:
    Global() : View(nullptr, 0) {}
    explicit Global(Array array) : View(reinterpret_cast<T*>(array.address), array.extent) {}
    explicit operator bool() const { return this->data_ != nullptr; }
    T* address(std::int64_t i) const { return this->data_ + i; }
};

template <class T>
class Shared : public host::View<T, host::Space::kShared> {
    using View = host::View<T, host::Space::kShared>;

public:
    Shared(T* data, std::int64_t extent) : View(data, extent) {}
    Shared slice(int first, int count) const {
        if (first < 0 || first + count > this->extent_) {
            host::fault("slice of " + std::to_string(count) + " from element " + std::to_string(first) +
                            " of a view of shared memory with " + std::to_string(this->extent_),
                        Site::current());
        }
        return Shared(this->data_ + first, count);
    }

    /// In the block's shared memory.
    unsigned address(std::int64_t i) const {
        return reinterpret_cast<unsigned char*>(this->data_ + i) - host::block->shared;
    }
};

class SharedArena {
public:
    template <class T>
    Shared<T> take(int count, Site site = Site::current()) {
        const int bytes = (count * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
        if (used_ + count * static_cast<int>(sizeof(T)) > host::block->shared_bytes) {
            host::fault("takes more shared memory than the " + std::to_string(host::block->shared_bytes) +
                            " bytes of the launch", site);
        }
        T* data = reinterpret_cast<T*>(host::block->shared + used_);
        used_ += bytes;
        return Shared<T>(data, count);
    }

private:
    int used_ = 0;
};

template <class T>
void copy_async(const Shared<std::remove_const_t<T>>& to, std::int64_t i, const Global<T>& from,
                std::int64_t j, bool mask = true, Site site = Site::current()) {
    constexpr int count = 16 / sizeof(T);
    host::check(from.access(host::Kind::kRead, j, count, mask), site);
    host::start_copy(to.access(host::Kind::kWrite, i, count, true), mask ? from.address(j) : nullptr, site);
}

template <class T>
void copy_async_word(const Shared<std::remove_const_t<T>>& to, std::int64_t i, const Global<T>& from,
                     std::int64_t j, bool mask = true, Site site = Site::current()) {
    static_assert(sizeof(T) == 4);
    host::check(from.access(host::Kind::kRead, j, 1, mask), site);
    host::start_copy(to.access(host::Kind::kWrite, i, 1, true), mask ? from.address(j) : nullptr, site);
}

inline void copy_async_commit() { host::commit_copies(); }

template <int kOpenGroups>
void copy_async_wait(Site site = Site::current()) {
    host::wait_for_copies(kOpenGroups, site);
}

inline std::int64_t compare_exchange(const Global<std::int64_t>& memory, std::int64_t i,
                                     std::int64_t expected, std::int64_t desired,
                                     Site site = Site::current()) {
    host::check(memory.access(host::Kind::kAtomic, i, 1, true), site);
    std::int64_t* address = memory.address(i);
    const std::int64_t found = *address;
    if (found == expected) *address = desired;
    return found;
}

// --- matrices --------------------------------------------------------------------------------------

struct FragmentA {
    std::uint32_t words[4];
};
struct FragmentB {
    std::uint32_t words[2];
};
struct FragmentC {
    float values[4];
};

namespace host {

using Row = Vector<std::uint16_t, 8>;  // of an 8x8 matrix of 2-byte elements

template <bool kTransposed>
void distribute_matrices(Slot* slots) {
    for (int lane = 0; lane < kLanes; ++lane) {
        auto& words = taken<Vector<std::uint32_t, 4>>(slots[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int r, int c) {
                return std::uint32_t{given<Row>(slots[matrix * 8 + r])[c]};
            };
            words[matrix] = kTransposed ? element(column, row) | element(column + 1, row) << 16
                                        : element(row, column) | element(row, column + 1) << 16;
        }
    }
}

template <class T>
Row matrix_row(const Shared<T>& memory, std::int64_t i, const Site& site) {
    static_assert(sizeof(T) == 2);
    return std::bit_cast<Row>(memory.template load_vector<8>(i, true, site));
}

struct Operands {
    FragmentA a;
    FragmentB b;
    FragmentC c;
};

template <class T>
void multiply(Slot* slots) {
    float a[16][16], b[16][8], c[16][8];
    const auto place = [](float* to, std::uint32_t word, int step) {
        const Pair pair = unpack<T>(word);
        to[0] = pair.low;
        to[step] = pair.high;
    };
    for (int lane = 0; lane < kLanes; ++lane) {
        const Operands& x = given<Operands>(slots[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) place(&a[row + i % 2 * 8][column + i / 2 * 8], x.a.words[i], 1);
        for (int i = 0; i < 2; ++i) place(&b[column + i * 8][row], x.b.words[i], 8);
        for (int i = 0; i < 4; ++i) c[row + i / 2 * 8][column + i % 2] = x.c.values[i];
    }
    for (int m = 0; m < 16; ++m) {
        float row[8];  // which stays in registers, as c does not
        std::copy_n(c[m], 8, row);
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) row[n] += a[m][k] * b[k][n];
        }
        std::copy_n(row, 8, c[m]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        auto& out = taken<FragmentC>(slots[lane]);
        for (int i = 0; i < 4; ++i) out.values[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

}  // namespace host

template <class T>
Vector<std::uint32_t, 4> load_matrices(const Shared<T>& memory, std::int64_t i, Site site = Site::current()) {
    return host::exchange<Vector<std::uint32_t, 4>>("load_matrices", site, host::matrix_row(memory, i, site),
                                                    host::distribute_matrices<false>);
}

template <class T>
Vector<std::uint32_t, 4> load_matrices_transposed(const Shared<T>& memory, std::int64_t i,
                                                  Site site = Site::current()) {
    return host::exchange<Vector<std::uint32_t, 4>>("load_matrices_transposed", site,
                                                    host::matrix_row(memory, i, site),
                                                    host::distribute_matrices<true>);
}

template <class T>
void mma(FragmentC& c, const FragmentA& a, const FragmentB& b, Site site = Site::current()) {
    c = host::exchange<FragmentC>("mma", site, host::Operands{a, b, c}, host::multiply<T>);
}

// --- launch ----------------------------------------------------------------------------------------

namespace host {
extern bool launching;
}

template <class Kernel>
void launch(std::int64_t grid, int shared_bytes, Stream, const typename Kernel::Params& params) {
    if (shared_bytes > Kernel::kMaxSharedBytes) {
        throw std::runtime_error(std::string(Kernel::kName) + " (" + params.shape() + "): " +
                                 std::to_string(shared_bytes) + " bytes of shared memory, at most " +
                                 std::to_string(Kernel::kMaxSharedBytes));
    }
    const unsigned blocks = checked_grid<Kernel>(grid, params);
    int cluster = 1;
    if constexpr (requires { Kernel::kCluster; }) cluster = Kernel::kCluster;
    if (!host::launching) return;
    const auto run = [&] { Kernel::run(params); };
    host::run_grid(Kernel::kName, blocks, cluster, Kernel::kThreads, shared_bytes, run);
}

/// Two, so few that blocks walk over several rows or sequences in a test, unless a test sets another number.
int processors(int device);

/// No, unless a test sets it.
bool is_hopper(int device);

/// 99 KB, as the smallest chips have, unless a test sets another.
int shared_memory_limit(int device);

/// What a launcher holds on a GPU.
struct CurrentDevice {
    explicit CurrentDevice(int) {}
};

namespace host {
extern int processors, shared_memory;
extern bool hopper;
}  // namespace host

}  // namespace gpt1
