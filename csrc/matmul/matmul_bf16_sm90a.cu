#include "matmul/hopper_launch.cuh"
#include "matmul/store.cuh"

template struct gpt1::HopperLaunch<gpt1::bf16, gpt1::Store<gpt1::bf16, gpt1::bf16>, false>;
template struct gpt1::HopperLaunch<gpt1::bf16, gpt1::Store<gpt1::bf16, gpt1::bf16>, true>;
template struct gpt1::HopperLaunch<gpt1::bf16, gpt1::Store<float, gpt1::bf16>, false>;
template struct gpt1::HopperLaunch<gpt1::bf16, gpt1::Store<float, gpt1::bf16>, true>;
