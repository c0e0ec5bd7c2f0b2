// What the host's module has beside the kernels: how threads are ordered, and what was counted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "platform/host_memory.h"
#include "platform/host_planted.h"
#include "platform/platform.cuh"
#include "platform/runtime.h"
#include "tensors.h"

namespace py = pybind11;

namespace gpt1 {

namespace {

void set_order(const std::string& name, std::uint64_t seed) {
    using host::Order;
    const std::map<std::string, Order> orders = {
        {"forward", Order::kForward}, {"reversed", Order::kReversed}, {"shuffled", Order::kShuffled}};
    const auto found = orders.find(name);
    if (found == orders.end()) {
        throw std::invalid_argument("order: '" + name + "', expected forward, reversed or shuffled");
    }
    host::set_order(found->second, seed);
}

std::vector<float> widened(DType dtype, const std::vector<std::uint16_t>& bits) {
    std::vector<float> values;
    dispatch_narrow(dtype, [&](auto element) {
        for (const std::uint16_t pattern : bits) {
            element.bits = pattern;
            values.push_back(to_float(element));
        }
    });
    return values;
}

std::vector<std::uint16_t> narrowed(DType dtype, const std::vector<float>& values) {
    std::vector<std::uint16_t> bits;
    dispatch_narrow(dtype, [&](auto element) {
        for (const float value : values) bits.push_back(from_float<decltype(element)>(value).bits);
    });
    return bits;
}

py::dict traffic() {
    py::dict kernels;
    for (const auto& [kernel, t] : host::traffic()) {
        kernels[py::str(kernel)] = py::dict(
            py::arg("launches") = t.launches, py::arg("compulsory") = t.compulsory,
            py::arg("issued") = t.issued, py::arg("shared_accesses") = t.shared_accesses,
            py::arg("bank_conflicts") = t.bank_conflicts, py::arg("conflicts_at") = t.conflicts_at);
    }
    return kernels;
}

std::pair<std::uintptr_t, std::int64_t> address_and_extent(Array array) {
    return {array.address, array.extent};
}

}  // namespace

void bind_platform(py::module_& module) {
    module.doc() = "The CUDA kernels on a CPU, thread by thread and checked: a tool for tests.";
    py::register_exception<host::Fault>(module, "KernelFault", PyExc_RuntimeError);
    module.def("set_order", &set_order, py::arg("order"), py::arg("seed") = 0,
               "In which order threads run between barriers: forward, reversed or shuffled.");
    module.def("set_processors", [](int count) { host::processors = count; }, py::arg("count"),
               "How many the chip has, which sizes grids that walk over rows, and splits sums; 2 at first.");
    module.def("set_shared_memory", [](int bytes) { host::shared_memory = bytes; }, py::arg("bytes"),
               "How much a block may ask for, by which launchers choose kernels; 101376 at first.");
    module.def("set_hopper", [](bool on) { host::hopper = on; }, py::arg("on"),
               "Whether products take the kernels for Hopper; not at first.");
    module.def("set_launching", [](bool on) { host::launching = on; }, py::arg("on"),
               "Off, launchers do all but run their kernels.");
    module.def("count_traffic", &host::count_traffic, py::arg("on"),
               "Counts sectors and bank conflicts of the launches from now on, from zero.");
    module.def("traffic", &traffic, "What was counted, by kernel.");
    module.def("planted_names", &host::planted_names, "Small kernels that test this platform.");
    module.def("run_planted", &host::run_planted, py::arg("name"), py::arg("planted"),
               "Runs one of them, with its bug or without; gives what it wrote.");
    module.def("array", &address_and_extent, py::arg("tensor"), "What a launcher takes of a tensor.");
    module.def("widened", &widened, py::arg("dtype"), py::arg("bits"), "Floats of 16-bit patterns.");
    module.def("narrowed", &narrowed, py::arg("dtype"), py::arg("values"), "16-bit patterns of floats.");
}

}  // namespace gpt1
