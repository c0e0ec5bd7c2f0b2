"""What Triton compiles for chips that are not here: no spills, shared memory for every chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
PRODUCTS = ("matmul_kernel", "split_matmul_kernel")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_fit_their_chip(capability):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env={**environment, "PYTHONPATH": str(script.parents[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {row["kernel"] for row in rows} == {
        "dropout_mask_kernel",
        "layer_norm_bwd_kernel",
        "layer_norm_fwd_kernel",
        "sum_partials_kernel",
        "sum_parts_kernel",
        *PRODUCTS,
    }
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        if row["kernel"] in PRODUCTS:
            exact = row["dtype"] == "torch.float32"
            assert (MATRIX_INSTRUCTION[capability] in row["matrix"]) is not exact, row
