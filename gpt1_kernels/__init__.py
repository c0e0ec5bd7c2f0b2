"""Fused kernels for GPT-1 and a drop-in model on top of them."""
