"""Fused kernels for GPT-1 and a drop-in model on top of them."""

from gpt1_kernels.backends import backend_report, use_backend
from gpt1_kernels.config import GPT1Config
from gpt1_kernels.errors import check_errors
from gpt1_kernels.heads import (
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
)
from gpt1_kernels.layers import (
    CausalSelfAttention,
    DropoutAddLayerNorm,
    GeluFFN,
    LayerNorm,
    LinearCrossEntropyLoss,
)
from gpt1_kernels.model import GPT1Model
from gpt1_kernels.task_model import GPT1TaskModel

__all__ = [
    "CausalSelfAttention",
    "DropoutAddLayerNorm",
    "GPT1Config",
    "GPT1DoubleHeadsModel",
    "GPT1ForSequenceClassification",
    "GPT1LMHeadModel",
    "GPT1Model",
    "GPT1TaskModel",
    "GeluFFN",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "backend_report",
    "check_errors",
    "use_backend",
]
