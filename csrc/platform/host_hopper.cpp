#include <limits>
#include <utility>

#include "platform/hopper.cuh"

namespace gpt1 {

TensorMap tensor_map(std::uintptr_t data, bool, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                     int box_rows) {
    if (data % 16 != 0 || stride % 8 != 0 || stride < columns || box_rows > 256) {
        throw std::runtime_error("tensor_map: " + shape_text("data", data, "rows", rows, "columns", columns,
                                                             "stride", stride, "box_rows", box_rows));
    }
    return {reinterpret_cast<const std::uint16_t*>(data), rows, columns, stride, box_rows};
}

namespace host {

// --- copies ----------------------------------------------------------------------------------------

namespace {

struct CopyBarrier {
    std::uint16_t arrivals;  // of a phase
    std::uint16_t pending : 15, parity : 1;
    std::int32_t bytes;  // that are expected and have not come
};
static_assert(sizeof(CopyBarrier) == sizeof(std::uint64_t));

CopyBarrier& copy_barrier(int rank, unsigned address, const Site& site) {
    auto& barrier = *reinterpret_cast<CopyBarrier*>(cluster[rank].shared + address);
    if (barrier.arrivals == 0xffff) fault("uses a barrier that has not been initialised", site);
    return barrier;
}

void check_alive(int rank, const Site& site) {
    if (rank < 0 || rank >= static_cast<int>(cluster.size())) {
        fault("writes to the block " + std::to_string(rank) + " of a cluster of " +
                  std::to_string(cluster.size()), site);
    }
    for (const Thread& t : cluster[rank].threads) {
        if (t.state != State::kExited) return;
    }
    fault("writes to the block " + std::to_string(rank) + " of its cluster, which has exited", site);
}

}  // namespace

void init_copy_barrier(unsigned address, int arrivals) {
    const auto count = static_cast<std::uint16_t>(arrivals);
    const CopyBarrier barrier{count, count, 0, 0};
    std::memcpy(block->shared + address, &barrier, sizeof(barrier));
}

void arrive_at_copy_barrier(int rank, unsigned address, int arrivals, int bytes, const Site& site) {
    check_alive(rank, site);
    CopyBarrier& barrier = copy_barrier(rank, address, site);
    if (arrivals > barrier.pending) fault("arrives at a barrier at which all have arrived", site);
    barrier.pending -= arrivals;
    barrier.bytes += bytes;
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
    wake(&barrier);
}

void wait_for_copy_barrier(unsigned address, std::uint32_t parity, const Site& site) {
    const CopyBarrier& barrier = copy_barrier(block->rank, address, site);
    while (barrier.parity == parity) wait_for(&barrier, "a copy barrier", site);
}

void start_box(const TensorMap& from, int row, int column, int first_rank, int end_rank, unsigned to,
               unsigned barrier, const Site& site) {
    constexpr int kRowBytes = kBoxColumns * 2;
    const int bytes = from.box_rows * kRowBytes;
    if (to % 1024 != 0) fault("copies a box to " + std::to_string(to) + ", no multiple of 1024 bytes", site);
    const std::int64_t extent = (from.rows - 1) * from.stride + from.columns;
    const auto end_row = std::min<std::int64_t>(row + from.box_rows, from.rows);
    const auto end_column = std::min<std::int64_t>(column + kBoxColumns, from.columns);
    for (std::int64_t m = row; m < end_row; ++m) {
        for (std::int64_t n = column; n < end_column; n += 8) {
            check({Space::kGlobal, Kind::kRead, from.data, m * from.stride + n, extent, 8, 2, false}, site);
        }
    }
    for (int rank = first_rank; rank < end_rank; ++rank) {
        check_alive(rank, site);
        const UseId use = begin_use(Kind::kWrite, cluster[rank], to, bytes, site);
        unsigned char* const start = cluster[rank].shared + to;
        std::memset(start, 0xff, bytes);
        at_last(site, [=] {
            end_use(use);
            for (int i = 0; i < from.box_rows; ++i) {
                for (int j = 0; j < kBoxColumns; ++j) {
                    const std::int64_t m = row + i, n = column + j;
                    const bool inside = m < from.rows && n < from.columns;
                    const std::uint16_t element = inside ? from.data[m * from.stride + n] : 0;
                    std::memcpy(start + swizzled(i * kRowBytes + j * 2), &element, 2);
                }
            }
            arrive_at_copy_barrier(rank, barrier, 0, -bytes, site);
        });
    }
}

// --- products --------------------------------------------------------------------------------------

namespace {

/// A warp's sums, (16, 8 fragments), while products are at work on them.
struct Sums {
    FragmentC* lanes[kLanes];
    int fragments;
    std::vector<float> values;

    template <class F>
    void for_each(const F& f) {
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int j = 0; j < fragments; ++j) {
                for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
                    f(values[row * fragments * 8 + column], lanes[lane][j].values[i]);
                }
            }
        }
    }
};

/// The rows of 128 bytes that hold all 16 terms of an operand's rows or columns first … last.
UseId read_rows(std::uint64_t descriptor, bool down, int first, int last, const Site& site) {
    if (descriptor >> 62 != 1) fault("multiplies an operand of another swizzle than 128 bytes", site);
    const std::int64_t start = operand_offset(descriptor, down, first, 0) / 128 * 128;
    const std::int64_t end = operand_offset(descriptor, down, last, 15) / 128 * 128 + 128;
    return begin_use(Kind::kRead, *block, start, end - start, site);
}

int first_row() { return thread->index / kLanes % kWarpsOfGroup * 16; }

}  // namespace

struct Product {
    std::uint64_t a, b;
    bool more;
    Multiply multiply;
    int group;
    std::shared_ptr<Sums> sums;
    UseId use_a, use_b;
    Site site;
};

void start_product(Slot* slots, int fragments, bool a_down, bool b_down, Multiply multiply) {
    const auto& x = given<ProductOfLane>(slots[0]);
    const Site& site = *x.site;
    for (int lane = 0; lane < kLanes; ++lane) {
        const auto& other = given<ProductOfLane>(slots[lane]);
        if (other.a == x.a && other.b == x.b && other.more == x.more) continue;
        fault("lanes multiply different operands", site);
    }
    auto& descriptors = block->warpgroups[thread->index / kWarpgroup].descriptors;
    const std::size_t number = 2 * warp().started++;
    if (descriptors.size() == number) descriptors.insert(descriptors.end(), {x.a, x.b});
    if (descriptors[number] != x.a || descriptors[number + 1] != x.b) {
        fault("warps of a warpgroup multiply different operands", site);
    }

    std::shared_ptr<Sums> sums;
    for (const auto& other : warp().products) {
        if (other->sums->lanes[0] == x.c) sums = other->sums;
    }
    if (!sums) {
        sums = std::make_shared<Sums>(Sums{{}, fragments, std::vector<float>(16 * 8 * fragments)});
        for (int lane = 0; lane < kLanes; ++lane) sums->lanes[lane] = given<ProductOfLane>(slots[lane]).c;
        sums->for_each([](float& value, float& of_lane) {
            value = std::exchange(of_lane, std::numeric_limits<float>::quiet_NaN());
        });
    }
    const UseId use_a = read_rows(x.a, a_down, first_row(), first_row() + 15, site);
    const UseId use_b = read_rows(x.b, b_down, 0, 8 * fragments - 1, site);
    warp().products.push_back(std::make_shared<Product>(
        Product{x.a, x.b, x.more, multiply, warp().groups, std::move(sums), use_a, use_b, site}));
}

void wait_for_products(int open_groups, const Site& site) {
    collective("wgmma_wait", site, [](Slot*) {});
    Warp& of = warp();
    const int end = of.groups - open_groups;
    if (of.products.empty() || of.products.front()->group >= end) return;
    if (lane() == 0) {
        at_last(site, [&of, end] {
            while (!of.products.empty() && of.products.front()->group < end) {
                const std::shared_ptr<Product> product = of.products.front();
                Sums& sums = *product->sums;
                of.products.erase(of.products.begin());
                if (!product->more) std::fill(sums.values.begin(), sums.values.end(), 0.0f);
                product->multiply(block->shared, first_row(), product->a, product->b, sums.values.data());
                end_use(product->use_a);
                end_use(product->use_b);
                if (product->sums.use_count() > 1) continue;
                sums.for_each([](float value, float& of_lane) { of_lane = value; });
            }
            wake(&of);
        });
    }
    wait_for(&of, "wgmma_wait", site);
}

void finish_products() {
    const auto& products = warp().products;
    if (!products.empty()) fault("exits before its product has been waited for", products.front()->site);
}

}  // namespace host

}  // namespace gpt1
