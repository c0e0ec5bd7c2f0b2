#include "platform/host.cuh"
#include "platform/runtime.h"

namespace gpt1 {

bf16::bf16(float x) {
    std::uint32_t word = std::bit_cast<std::uint32_t>(x);
    if (std::isnan(x)) {
        bits = 0x7fff;
        return;
    }
    word += 0x7fff + (word >> 16 & 1);  // half a unit in the last place, a tie to even
    bits = word >> 16;
}

fp16::fp16(float x) {
    const std::uint32_t word = std::bit_cast<std::uint32_t>(x);
    const std::uint16_t sign = word >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) {
        bits = 0x7fff;
    } else if (size >= 65520.0f) {
        bits = sign | 0x7c00;
    } else if (size < 0x1p-14f) {
        // Next to 0.5 a float's last place is that of the smallest fp16, so the addition rounds.
        const float rounded = size + 0.5f;
        bits = sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rounded) - 0x3f000000);
    } else {
        const std::uint32_t magnitude = word & 0x7fffffff;
        const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        bits = sign | static_cast<std::uint16_t>((rounded >> 13) - (112 << 10));
    }
}

float to_float(fp16 x) {
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
    if (exponent == 0) {
        const float size = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -size : size;
    }
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

namespace host {

int processors = 2, shared_memory = 99 * 1024;
bool launching = true, hopper = false;

}  // namespace host

int processors(int) { return host::processors; }

bool is_hopper(int) { return host::hopper; }

int shared_memory_limit(int) { return host::shared_memory; }

void prepare(int) {}

std::pair<int, int> versions() { return {0, 0}; }

}  // namespace gpt1
