"""The floors of a roofline: the bytes that an op must move, and the FLOPs that it must do.

Bytes: every input is read once and every output written once, what is saved for backward included;
so are bitmaps of dropout; the partial sums of a reduction over rows are written and read. Memory
moves whole sectors of 32 bytes. FLOPs: two for each multiply-add of a matrix product, half of them
where the causal mask hides half; element-wise arithmetic hides behind the bytes and does not count.

Sizes are named as in the ops: B batch, T positions, H heads, D head size, N = B · T rows, C width,
F hidden width, V vocabulary, P positions in the table; `s` and `p` are the bytes of an element of
an activation and of a parameter, `programs` the grid that leaves one partial sum each.
"""

from __future__ import annotations

from typing import NamedTuple

SECTOR = 32
SEED = 16  # bytes
_STATISTICS = 2 * 4  # mean and rstd of a row


class Floor(NamedTuple):
    bytes: int
    flops: int = 0


def dropout_bits(rows: int, T: int) -> int:
    """Bytes of causal bitmaps of T columns: row i of T needs the columns up to i."""
    bits_of_sector = 8 * SECTOR
    of_matrix = sum(i // bits_of_sector + 1 for i in range(T)) * SECTOR
    return rows // T * of_matrix


def dropout_mask(B: int, H: int, T: int) -> Floor:
    """Causal bits, written."""
    return Floor(SEED + dropout_bits(B * H * T, T))


def layer_norm_fwd(N: int, C: int, s: int, p: int) -> Floor:
    """x → y, statistics; w and b are read."""
    return Floor(2 * N * C * s + 2 * C * p + N * _STATISTICS)


def layer_norm_bwd(N: int, C: int, s: int, p: int, programs: int) -> Floor:
    """dy, x, w, statistics → dx, dw, db."""
    return Floor(3 * N * C * s + 3 * C * p + N * _STATISTICS + _partials(2, programs, C))


def dropout_add_layer_norm_fwd(N: int, C: int, s: int, p: int) -> Floor:
    """x, residual → y, their sum, statistics; w, b and x_bias are read."""
    return Floor(4 * N * C * s + 3 * C * p + N * _STATISTICS + SEED)


def dropout_add_layer_norm_bwd(
    N: int, C: int, s: int, p: int, programs: int, readers: int = 1
) -> Floor:
    """dy of each reader, the sum, w, statistics → dx, dresidual, dw, db, dx_bias (fp32)."""
    parameters = 3 * C * p + 4 * C
    partials = _partials(3, programs, C)
    return Floor((3 + readers) * N * C * s + parameters + N * _STATISTICS + SEED + partials)


def embedding_fwd(N: int, T: int, C: int, s: int, read: int) -> Floor:
    """int64 ids, T positions and the `read` distinct rows of the token table → out."""
    return Floor(8 * N + (T + read + N) * C * s + SEED)


def embedding_bwd(N: int, V: int, P: int, C: int, s: int) -> Floor:
    """int64 ids, dout → the gradients of both tables."""
    return Floor(8 * N + (N + V + P) * C * s + SEED)


def causal_attention_fwd(B: int, T: int, H: int, D: int, s: int, dropout: bool = True) -> Floor:
    """q, k, v, dropout bits → o, lse; the products S and PV."""
    A, rows = B * T * H * D * s, B * H * T
    bits = dropout_bits(rows, T) if dropout else 0
    return Floor(4 * A + bits + 4 * rows, 2 * _causal_product(rows, T, D))


def causal_attention_bwd(
    B: int, T: int, H: int, D: int, s: int, launches: int, dropout: bool = True
) -> Floor:
    """q, k, v, o, do, dropout bits, lse → dq, dk, dv.

    Of two launches the first leaves delta to the second. The products are S, dP, dV, dQ and dK.
    """
    A, rows = B * T * H * D * s, B * H * T
    bits = dropout_bits(rows, T) if dropout else 0
    statistics = (12 if launches == 2 else 4) * rows
    return Floor(8 * A + bits + statistics, 5 * _causal_product(rows, T, D))


def gelu_ffn_fwd(N: int, C: int, F: int, s: int, p: int) -> Floor:
    """x, both weights and biases → y and the pre-activation; GELU passes between two products."""
    parameters = 2 * C * F * s + (F + C) * p
    return Floor((2 * N * C + 2 * N * F + N * F) * s + parameters, 4 * N * C * F)


def gelu_ffn_bwd(N: int, C: int, F: int, s: int, p: int) -> Floor:
    """dy, x, the pre-activation, its GELU, weights → gradients; du passes between the products."""
    parameters = 4 * C * F * s + (F + C) * p
    return Floor((3 * N * C + 2 * N * F + 2 * N * F) * s + parameters, 8 * N * C * F)


def linear_cross_entropy(N: int, C: int, V: int, s: int) -> Floor:
    """h, w, int64 targets → losses, dh and an fp32 dw, in one pass: forward of a mean.

    The logits are not counted: they need not leave the chip. Three products.
    """
    return Floor(2 * N * C * s + V * C * (s + 4) + 12 * N, 6 * N * C * V)


def linear_cross_entropy_fwd(N: int, C: int, V: int, s: int) -> Floor:
    """h, w, int64 targets → losses, where nobody wants a gradient; one product."""
    return Floor((N + V) * C * s + 12 * N, 2 * N * C * V)


def model_flops(tokens: int, T: int, C: int, V: int, layers: int) -> int:
    """FLOPs of a language model's forward and backward pass, by which its utilisation is measured.

    Recomputation does not count: attention's backward has four products, without that of S.
    """
    linear = 12 * C * C * layers + C * V
    return tokens * (6 * linear + 6 * T * C * layers)


def _partials(sums: int, programs: int, C: int) -> int:
    """fp32 partial sums, written and read."""
    return 2 * sums * programs * C * 4


def _causal_product(rows: int, T: int, D: int) -> int:
    """FLOPs of a product of T × T scores, half of them masked, for every row of all heads."""
    return rows * T * D
