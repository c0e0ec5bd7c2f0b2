"""One update of the paper's model on two CPU cores, against `transformers`' eager one."""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.train_step import SIDES, B, T, bare_products, build, config, make_step

pytest.importorskip("transformers")

ROUNDS = 5
TINY = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2}

each_kind = pytest.mark.parametrize(
    ("dtype", "dropout"), [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.0), ("bf16", 0.1)]
)


@pytest.fixture
def report(capsys):
    """Prints a line at once, past pytest's capture."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return line


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@pytest.mark.parametrize(("dtype", "relative"), [("fp32", 1e-5), ("bf16", 3e-3)])
def test_both_sides_start_at_the_same_loss(dtype, relative):
    small = config(dropout=0.0, **TINY)
    input_ids = torch.randint(small.vocab_size, (B, T))
    ours, theirs = (make_step(build(side, small), dtype)(input_ids) for side in SIDES)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=relative, atol=0)


@each_kind
def test_update(benchmark, report, dtype, dropout):
    """Rounds of ours, theirs and the bare products alternate, so that all meet the same machine."""
    full = config(dropout)
    input_ids = torch.randint(full.vocab_size, (B, T))
    ours, theirs = (make_step(build(side, full), dtype) for side in SIDES)
    products = bare_products(full, dtype)
    their_times, product_times = [], []

    def others_first() -> None:
        their_times.append(seconds(theirs, input_ids))
        product_times.append(seconds(products))

    benchmark.pedantic(ours, args=(input_ids,), setup=others_first, rounds=ROUNDS, warmup_rounds=1)
    median = statistics.median(benchmark.stats.stats.data)
    their_median = statistics.median(their_times[1:])
    product_median = statistics.median(product_times[1:])
    report(
        f"{dtype}, dropout {dropout}: {median:.2f} s an update, transformers {their_median:.2f} s, "
        f"{their_median / median:.2f} x; bare products {product_median:.2f} s, "
        f"{product_median / median:.0%} of ours"
    )
    benchmark.extra_info.update(
        transformers_s=their_median, products_s=product_median, times=their_median / median
    )


@each_kind
def test_peak_memory(report, dtype, dropout):
    """In a process each, beyond parameters, gradients and optimizer state."""
    ours, theirs = (
        int(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.train_step", side, dtype, str(dropout)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for side in SIDES
    )  # fmt: skip
    report(
        f"{dtype}, dropout {dropout}: {ours} MB beyond the model's state, "
        f"transformers {theirs} MB, {ours / theirs:.2f} of it"
    )
