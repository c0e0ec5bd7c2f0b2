#include "matmul/matmul_products.cuh"

template struct gpt1::MatmulLaunch<gpt1::fp16>;
