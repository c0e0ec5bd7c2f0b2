#include "ffn/ffn_products.cuh"

template struct gpt1::FfnLaunch<gpt1::bf16>;
