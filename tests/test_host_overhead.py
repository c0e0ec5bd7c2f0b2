"""`benchmarks.host_overhead` times every op, and sees what is added to one."""

import time

import pytest

from benchmarks.host_overhead import host_overhead
from gpt1_kernels import ops
from tests.cases import backends_of

ROUNDS, ADDED = 9, 3000  # µs


@pytest.mark.parametrize(
    "backend", [b for b in backends_of("layer_norm") if b != "portable"] or ["none"]
)
def test_what_is_added_to_an_op_is_seen(backend, monkeypatch):
    before = host_overhead(backend, ROUNDS)
    assert before.keys() == set(ops.__all__) - {"dropout_mask"}
    assert all(empty > 0 for _, empty in before.values())

    layer_norm = ops.layer_norm

    def slower(*args):
        time.sleep(ADDED / 1e6)
        return layer_norm(*args)

    monkeypatch.setattr(ops, "layer_norm", slower)
    after = host_overhead(backend, ROUNDS)
    assert after["layer_norm"][0] > before["layer_norm"][0] + ADDED / 2
    assert after["gelu_ffn"][0] < before["gelu_ffn"][0] + ADDED / 2
