"""The embedding on every backend: what its gradients must survive, however often an id repeats."""

import sys
from functools import partial

import pytest
import torch

from gpt1_kernels import errors, ops, use_backend
from gpt1_kernels.backends import kernel
from gpt1_kernels.rng import keep_mask, keep_scale
from tests.cases import (
    DEVICE,
    DTYPES,
    SEED,
    UNORDERED,
    P,
    backends_of,
    check_ids_as_on_a_gpu,
    check_parity,
    check_repeatable,
    embedding,
    on_backends,
    results,
)

CHUNK = 64  # rows that share a partial sum

on_each_backend = pytest.mark.parametrize("backend", backends_of("embedding"))
needs_triton = pytest.mark.skipif(
    "triton" not in backends_of("embedding"), reason="Triton cannot run here"
)


def runs(*lengths: int) -> torch.Tensor:
    """(8, sum of lengths / 8), shuffled, in which the ids 3, 4, … occur that many times."""
    ids = torch.arange(3, 3 + len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].view(8, -1)


ALL_DIFFERENT = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:260].view(4, 65)
CASES = [
    embedding("one-position", 3, 1, 50, 48),
    embedding("gpt1-width-and-a-tile-of-one-position", 3, 17, 50, 768, P),
    embedding("given-positions-below-a-power-of-two", 1, 511, 50, 48, P, offset=3),
    embedding("positions-above-a-power-of-two", 1, 513, 50, 80),
    embedding("programs-walk-over-sequences", 19, 2, 50, 768, P),
    embedding("a-type-is-an-id", 3, 17, 7, 48, ids=3, types=True),
    embedding("types-over-several-chunks", 3, 65, 9, 48, P, types=True, offset=1),
    embedding("all-ids-differ", 4, 65, 300, 48, ids=ALL_DIFFERENT),
]
RUNS = [
    embedding("no-run-ends-with-its-chunk", 8, 50, 12, 16, ids=runs(1, 100, 2, 200, 97)),
    embedding("runs-of-whole-chunks", 8, 56, 12, 16, ids=runs(64, 128, 192, 64)),
    embedding("runs-end-around-their-chunk", 8, 48, 12, 16, ids=runs(63, 64, 65, 1, 127, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(CASES + RUNS)
def test_parity(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends(RUNS, UNORDERED)
def test_two_runs_are_bit_equal(case, backend):
    check_repeatable(case, backend)


@on_each_backend
def test_one_id_repeated_32768_times(backend):
    check_parity(embedding("one-id", 512, 64, 50, 16, ids=7), backend, torch.float32)


@on_each_backend
def test_gradients_are_exact_where_sums_are(backend):
    """Integers add without rounding, so any row lost, doubled or misplaced shows."""
    generator = torch.Generator().manual_seed(1)
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 200):
        ids = torch.randint(length // 20 + 2, (3, length), generator=generator).to(DEVICE)
        tables = torch.zeros(40, 16, device=DEVICE), torch.zeros(length, 16, device=DEVICE)
        dout = torch.randint(-9, 10, (3, length, 16), generator=generator).to(DEVICE).float()
        with use_backend(backend):
            call = partial(ops.embedding, ids, position_ids=torch.zeros_like(ids))
            actual = results(call, {"w_token": tables[0], "w_position": tables[1]}, dout)
        expected = torch.zeros(40, 16, device=DEVICE).index_add(
            0, ids.flatten(), dout.flatten(0, 1)
        )
        assert torch.equal(actual["w_token"], expected)
        assert torch.equal(actual["w_position"][0], dout.sum((0, 1)))
        assert not actual["w_position"][1:].any()


@on_each_backend
def test_ids_of_any_layout_and_width(backend):
    case = embedding("layouts", 3, 17, 50, 48, P, types=True, offset=2)
    given = {"ids": case.fused.args[0], **case.fused.keywords}
    with use_backend(backend):
        expected = results(case.fused, case.inputs)
        for name in ("ids", "position_ids", "token_type_ids"):
            wide = torch.stack([given[name], given[name]], dim=-1)
            for ids in (given[name].int(), wide[..., 0]):
                actual = results(partial(ops.embedding, **{**given, name: ids}), case.inputs)
                for key, value in expected.items():
                    assert torch.equal(actual[key], value), (name, key)


@needs_triton
def test_only_the_kernels_of_needed_gradients_are_launched(launches):
    case = embedding("needs", 2, 17, 50, 48)
    forward, runs = "embedding_fwd_kernel", ["embedding_bwd_kernel"]
    for wanted, kernels in (
        (["w_token"], runs),
        (["w_position"], ["embedding_bwd_positions_kernel"]),
        (["w_token", "w_position"], [*runs, "embedding_bwd_positions_kernel"]),
    ):
        inputs = {k: x.clone().requires_grad_(k in wanted) for k, x in case.inputs.items()}
        launches.clear()
        with use_backend("triton"):
            case.fused(**inputs).sum().backward()
        counts = {kernel: n for (_, kernel), n in launches.items() if kernel.endswith("_kernel")}
        assert counts == dict.fromkeys([forward, *kernels], 1)


@on_each_backend
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("name", ["ids", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("value", [-1, 50, 2**40])
def test_a_kernel_meets_an_id_out_of_range(name, value, p, backend, monkeypatch):
    """As on a GPU, where nothing is checked before the launch."""
    kernels = sys.modules[kernel(backend, "embedding", "embedding_fwd").__module__]
    monkeypatch.setattr(kernels, "check_ids", check_ids_as_on_a_gpu(backend))
    generator = torch.Generator().manual_seed(2)
    good = {
        n: torch.randint(50, (2, 17), generator=generator).to(DEVICE)
        for n in ("ids", "position_ids", "token_type_ids")
    }
    bad = {**good, name: good[name].clone()}
    bad[name][1, 3] = value
    worse = {**good, name: torch.full_like(good[name], 60)}
    tables = torch.randn(50, 48, device=DEVICE), torch.randn(50, 48, device=DEVICE)
    dout = torch.randn(2, 17, 48, device=DEVICE)
    dropout = SEED if p > 0.0 else None, p, 0

    def run(ids):
        out = kernels.embedding_fwd(ids["ids"], *tables, *list(ids.values())[1:], *dropout, dtype)
        return out, kernels.embedding_bwd(dout, *ids.values(), *dropout, 50, 50, dtype, [True] * 2)

    dtype = torch.float32
    (out, gradients), (good_out, good_gradients) = run(bad), run(good)
    run(worse)  # the first id stays
    with pytest.raises(IndexError, match=rf"embedding: id {value} is out of range \[0, 50\)"):
        errors.check_errors()
    errors.check_errors()  # which has nothing more to say

    assert out[1, 3].isnan().all()
    good_out[1, 3] = torch.nan
    torch.testing.assert_close(out, good_out, rtol=0, atol=0, equal_nan=True)
    undropped = dout[1, 3] * keep_mask(SEED, 34, 48, p)[20] * keep_scale(p)
    good_gradients[name == "position_ids"][good[name][1, 3]] -= undropped
    for actual, expected in zip(gradients, good_gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", [b for b in backends_of("embedding") if b != "portable"])
@pytest.mark.parametrize("value", [-2, 5])
def test_a_run_of_ids_out_of_range_is_written_nowhere(value, backend):
    """Neither to a row of the gradient nor beside it, from inside a chunk or from several."""
    kernels = sys.modules[kernel(backend, "embedding", "embedding_fwd").__module__]
    for length in (9, 2 * CHUNK + 1):
        memory = torch.zeros(9, 16, device=DEVICE)
        ids = torch.full((1, length), value, device=DEVICE)
        dout = torch.ones(1, length, 16, device=DEVICE)
        kernels._add_by_id(dout, [ids], memory[2:7], None, (0, 1.0, 0))
        assert not memory.any()
