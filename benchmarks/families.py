"""What `benchmarks.tune` tries: for each family of kernels, a grid of configurations."""

from __future__ import annotations

from typing import NamedTuple

from gpt1_kernels.backends.triton import launch


class Family(NamedTuple):
    """Kernels of an op whose configuration, of type `tiles`, one name in `launch.py` chooses."""

    op: str
    kernels: tuple[str, ...]
    heuristic: str
    tiles: type
    grid: dict[str, tuple[int, ...]]
    """Values to try for fields of `tiles`; the others stay as they are."""


def _attention(part: str, kernel: str) -> Family:
    grid = {
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    }
    heuristic = f"attention_{part}_tiles"
    return Family("causal_attention", (kernel,), heuristic, launch.AttentionTiles, grid)


def _rows(op: str, kernel: str, heuristic: str = "row_tiles") -> Family:
    grid = {"BLOCK_N": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)}
    return Family(op, (kernel,), heuristic, launch.RowTiles, grid)


FAMILIES = {
    "attention_fwd": _attention("fwd", "causal_attention_fwd_kernel"),
    "attention_dq": _attention("dq", "causal_attention_bwd_dq_kernel"),
    "attention_dkdv": _attention("dkdv", "causal_attention_bwd_dkdv_kernel"),
    "product": Family(
        "gelu_ffn", ("matmul_kernel", "split_matmul_kernel"), "product_tiles", launch.ProductTiles,
        {"BLOCK_M": (64, 128), "BLOCK_N": (128, 256), "BLOCK_K": (32, 64), "num_warps": (4, 8),
         "num_stages": (3, 4)},
    ),
    "layer_norm_fwd": _rows(
        "dropout_add_layer_norm", "layer_norm_fwd_kernel", "layer_norm_fwd_tiles"
    ),
    "layer_norm_bwd": _rows("dropout_add_layer_norm", "layer_norm_bwd_kernel"),
    "partials": Family(
        "dropout_add_layer_norm", ("sum_partials_kernel",), "PARTIAL_TILES", launch.PartialTiles,
        {"BLOCK_P": (64, 128, 256), "BLOCK_C": (8, 16, 32), "num_warps": (2, 4, 8)},
    ),
    "dropout_mask": Family(
        "dropout_mask", ("dropout_mask_kernel",), "BIT_TILES", launch.BitTiles,
        {"BLOCK_R": (32, 64, 128, 256), "BLOCK_W": (2, 4, 8), "num_warps": (1, 2, 4, 8)},
    ),
    "embedding_fwd": _rows("embedding", "embedding_fwd_kernel"),
    "embedding_positions": _rows("embedding", "embedding_bwd_positions_kernel"),
    "embedding_bwd": Family(
        "embedding", ("embedding_bwd_kernel",), "chunk_tiles", launch.ChunkTiles,
        {"CHUNK": (32, 64, 128), "BLOCK_N": (2, 4, 8), "num_warps": (2, 4, 8)},
    ),
    "embedding_runs": Family(
        "embedding", ("embedding_bwd_runs_kernel",), "RUN_TILES", launch.PartialTiles,
        {"BLOCK_P": (16, 64, 256), "BLOCK_C": (16, 64, 128), "num_warps": (2, 4, 8)},
    ),
    "cross_entropy": Family(
        "linear_cross_entropy", ("cross_entropy_kernel",), "vocabulary_tiles",
        launch.VocabularyTiles, {"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
    ),
    "scale_gradients": _rows("linear_cross_entropy", "scale_gradients_kernel"),
}  # fmt: skip
