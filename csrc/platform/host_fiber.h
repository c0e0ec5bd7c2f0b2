// Cooperative fibers: each thread of a block has a stack of its own and runs until it waits.
#pragma once

#include <cstddef>

namespace gpt1::host {

/// Saves the callee's registers on this stack, remembers it in `*from`, and goes on on stack `to`.
extern "C" void gpt1_switch_stack(void** from, void* to);

/// The first stack pointer of a fiber that will call `entry`, which must never return.
void* new_fiber(unsigned char* stack, std::size_t bytes, void (*entry)());

}  // namespace gpt1::host
