"""The fused ops. Each file reads: maths, schema and fake, autograd, public function."""

from gpt1_kernels.ops.attention import causal_attention, causal_attention_qkvpacked
from gpt1_kernels.ops.dropout import dropout_mask
from gpt1_kernels.ops.embedding import embedding
from gpt1_kernels.ops.ffn import gelu_ffn
from gpt1_kernels.ops.layer_norm import dropout_add_layer_norm, layer_norm
from gpt1_kernels.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "causal_attention",
    "causal_attention_qkvpacked",
    "dropout_add_layer_norm",
    "dropout_mask",
    "embedding",
    "gelu_ffn",
    "layer_norm",
    "linear_cross_entropy",
]
