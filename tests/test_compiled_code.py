"""What Triton compiles for chips that are not here: no spills, shared memory for every chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALLEST_SHARED_MEMORY = 99 * 1024  # of compute capabilities 8.6, 8.9 and 12.0


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
        "cross_entropy_kernel",
        "dropout_mask_kernel",
        "layer_norm_bwd_kernel",
        "layer_norm_fwd_kernel",
        "matmul_kernel",
        "scale_gradients_kernel",
        "sum_partials_kernel",
    }
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["shared"] <= SMALLEST_SHARED_MEMORY, row
