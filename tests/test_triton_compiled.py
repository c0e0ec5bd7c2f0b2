"""What Triton compiles for chips that are not here, and how often it compiles.

The kernels are those that the ops launch at GPT-1's shapes.
"""

from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("triton")

from benchmarks import baseline, triton_code
from benchmarks.sass import narrow_accesses

MATRIX_UNIT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

MULTIPLYING = {
    "causal_attention_bwd_dkdv_kernel",
    "causal_attention_bwd_dq_kernel",
    "causal_attention_fwd_kernel",
    "matmul_kernel",
    "split_matmul_kernel",
}
"""The kernels that must use the matrix units, but for fp32, which those do not compute."""

NARROW = {
    "dropout_mask_kernel": (2, "the seed, two words that all threads share"),
    "layer_norm_fwd_kernel": (4, "mean and rstd, one number a row; the seed"),
    "layer_norm_bwd_kernel": (4, "mean and rstd, one number a row; the seed"),
    "causal_attention_fwd_kernel": (3, "words of dropout bits, one a row"),
    "causal_attention_bwd_dq_kernel": (6, "words of dropout bits, one a row"),
    "causal_attention_bwd_dkdv_kernel": (4, "words of dropout bits, lse and delta, one a row"),
    "scale_gradients_kernel": (1, "the scale, one number"),
    "matmul_kernel": (32, "an epilogue's bias or sums, one number a column"),
    "embedding_fwd_kernel": (20, "three ids a row, each with its record of errors; the seed"),
    "embedding_bwd_kernel": (12, "an id and an index a row; the seed"),
    "embedding_bwd_runs_kernel": (9, "an id a partial sum"),
}
"""How many narrow accesses a kernel's loops may hold although they weigh, and what they are."""


@cache
def compiled(what: str, capability: int):
    """What `compile_triton.py` prints."""
    script = Path(__file__).with_name("compile_triton.py")
    return triton_code.without_interpreter(str(script), what, str(capability))


on_each_chip = pytest.mark.parametrize("capability", list(MATRIX_UNIT))


dtypes = pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow),
              pytest.param("float16", marks=pytest.mark.slow)]
)  # fmt: skip


@dtypes
@on_each_chip
def test_kernels_fit_their_chip(capability, dtype):
    rows = triton_code.compiled(capability, dtype)
    assert {row["kernel"] for row in rows} == {
        *MULTIPLYING,
        "cross_entropy_kernel",
        "dropout_mask_kernel",
        "embedding_bwd_kernel",
        "embedding_bwd_positions_kernel",
        "embedding_bwd_runs_kernel",
        "embedding_fwd_kernel",
        "layer_norm_bwd_kernel",
        "layer_norm_fwd_kernel",
        "scale_gradients_kernel",
        "sum_partials_kernel",
        "sum_parts_kernel",
        "sum_rows_kernel",
    }
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        multiplies = row["kernel"] in MULTIPLYING and dtype != "float32"
        assert (MATRIX_UNIT[capability] in row["matrix_units"]) is multiplies, row


@pytest.mark.skipif(
    Version(metadata.version("triton")) < Version("3.9"),
    reason="before Triton 3.9 a few bytes spill, and embedding_bwd_kernel has narrow accesses",
)
@dtypes
@on_each_chip
def test_nothing_spills_and_accesses_are_wide(capability, dtype):
    for row in triton_code.compiled(capability, dtype):
        assert row["stack"] == row["local"] == 0, row
        assert row["accesses"], row
        allowed, _ = NARROW.get(row["kernel"], (0, ""))
        assert len(narrow_accesses(row["accesses"])) <= allowed, row


@on_each_chip
def test_the_code_is_the_baselines(capability):
    if reason := baseline.mismatch("triton", triton_code.versions()):
        pytest.skip(reason)
    baseline.check("triton", triton_code.rows(capability))


@on_each_chip
def test_the_checks_see(capability):
    """A product on the matrix units, narrow loads and a kernel that spills are told apart."""
    product, transposing, crowded = compiled("probes", capability)
    assert product["matrix_units"] == [MATRIX_UNIT[capability]]
    assert not narrow_accesses(product["accesses"])
    assert transposing["matrix_units"] == []
    assert set(narrow_accesses(transposing["accesses"])) == {2}
    assert product["stack"] == transposing["stack"] == 0
    assert crowded["stack"] > 0


def test_no_exemption_is_for_a_kernel_that_is_gone():
    kernels = {row["kernel"] for row in triton_code.compiled(90, "bfloat16")}
    assert NARROW.keys() | MULTIPLYING <= kernels


def test_dropout_bits_are_drawn_under_triton_debug():
    """Which asserts that no integer overflows: Philox's keys are meant to."""
    assert compiled("assertions", 90) == 0


def test_twenty_lengths_compile_once_a_class():
    """Words of dropout bits in a row have three classes: one, a multiple of 16, any other."""
    layer_norm = dict.fromkeys(
        ["layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "sum_partials_kernel"], 1
    )
    assert compiled("compilations", 90) == {
        "layer_norm": layer_norm,
        "dropout_add_layer_norm": layer_norm,
        "dropout_mask": {"dropout_mask_kernel": 3},
        "causal_attention": dict.fromkeys(
            [f"causal_attention_{part}_kernel" for part in ("fwd", "bwd_dq", "bwd_dkdv")], 1
        ),
        # Products of five layouts or epilogues, since dW₁ and dW₂ share theirs; sums of partials
        # of F and of C columns.
        "gelu_ffn": {"matmul_kernel": 5, "sum_partials_kernel": 2, "sum_rows_kernel": 1},
        # Products: logits, dh, dW; the loss with gradients, without, and in backward.
        "linear_cross_entropy": {
            "matmul_kernel": 3,
            "cross_entropy_kernel": 3,
            "scale_gradients_kernel": 2,
        },
        "embedding": {
            "embedding_fwd_kernel": 2,  # with types and given positions, and without
            "embedding_bwd_kernel": 1,
            "embedding_bwd_runs_kernel": 1,
            "embedding_bwd_positions_kernel": 1,
        },
    }
