// The context switch, in few instructions: it happens at every barrier and shuffle of a thread.
#include "platform/host_fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// What a callee preserves: six registers, then the return address.
asm(R"(
.text
.globl gpt1_switch_stack
.hidden gpt1_switch_stack
.type gpt1_switch_stack, @function
gpt1_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size gpt1_switch_stack, . - gpt1_switch_stack
)");
constexpr int kReturnWord = 6;
constexpr int kFrameWords = 8;   // and one more, where a caller's return address would lie
#elif defined(__aarch64__)
// x19 to x30, of which x30 is the return address, and d8 to d15.
asm(R"(
.text
.globl gpt1_switch_stack
.hidden gpt1_switch_stack
.type gpt1_switch_stack, %function
gpt1_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size gpt1_switch_stack, . - gpt1_switch_stack
)");
constexpr int kReturnWord = 11;
constexpr int kFrameWords = 20;
#else
#error "the host platform knows x86-64 and aarch64"
#endif

namespace gpt1::host {

void* new_fiber(unsigned char* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) / 16 * 16;
    auto* frame = reinterpret_cast<std::uintptr_t*>(top) - kFrameWords;
    std::memset(frame, 0, kFrameWords * sizeof(*frame));
    frame[kReturnWord] = reinterpret_cast<std::uintptr_t>(entry);
    return frame;
}

}  // namespace gpt1::host
