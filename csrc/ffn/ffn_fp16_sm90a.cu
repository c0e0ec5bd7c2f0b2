#include "ffn/gelu_epilogue.cuh"
#include "matmul/hopper_launch.cuh"

template struct gpt1::HopperLaunch<gpt1::fp16, gpt1::Gelu<gpt1::fp16>, false>;
template struct gpt1::HopperLaunch<gpt1::fp16, gpt1::Dgelu<gpt1::fp16>, false>;
