"""What decides a benchmark's figures: its clock, its floors, its oracle, its arithmetic."""

import inspect
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases, compare_models, timing, train_step
from benchmarks.cases import (
    GPT1,
    CausalAttention,
    DropoutAddLayerNorm,
    DropoutMask,
    Embedding,
    GeluFFN,
    LayerNorm,
    LinearCrossEntropy,
)
from benchmarks.ceilings import Ceilings
from benchmarks.compare import Result, call, compare
from benchmarks.compare_models import ModelResult, Size
from benchmarks.host_overhead import unchecked_ids
from benchmarks.peers import PEERS, Implementation, implementations, sdpa
from benchmarks.roofline import Floor, dropout_bits, model_flops
from benchmarks.table import aligned, cells, figures, model_figures
from benchmarks.timing import Timing, measure, samples
from benchmarks.train_step import Side
from gpt1_kernels import reference
from tests import cuda_graphs

H200 = Ceilings(bandwidth=4.3e12, rate=790e12)
TINY = [
    CausalAttention(B=3, T=20, H=2, D=8, p=0.1),
    CausalAttention(B=3, T=20, H=2, D=8),
    DropoutMask(B=3, T=40, H=2),
    DropoutAddLayerNorm(N=37, C=48, p=0.1),
    LayerNorm(N=37, C=48),
    GeluFFN(N=37, C=16, F=64),
    LinearCrossEntropy(N=37, C=16, V=100),
    Embedding(B=3, T=9, C=16, V=50, p=0.1),
]

TINY_MODEL = {"vocab_size": 50, "n_positions": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}

each_case = pytest.mark.parametrize("case", TINY, ids=str)


class Machine:
    """A host that launches, and a device that does one thing after the other; times in seconds."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.host, self.device) + device

    def wait(self) -> None:
        self.host = max(self.host, self.device)


@pytest.fixture
def machine(monkeypatch):
    """Stands in for `torch.cuda`: what reads the cache takes 20 µs."""
    machine = Machine()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.reached = max(machine.host, machine.device)

        def query(self):
            return self.reached <= machine.host

        def elapsed_time(self, end):
            return 1e3 * (end.reached - self.reached)

    cuda = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: machine.launch(2e-6, cycles / 2e9),
        synchronize=machine.wait,
        get_device_properties=lambda: SimpleNamespace(L2_cache_size=1 << 20),
    )
    buffer = SimpleNamespace(amax=lambda: machine.launch(2e-6, 20e-6))
    buffer.view = lambda dtype: buffer
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing.torch, "zeros", lambda *shape, **kwargs: buffer)
    return machine


@pytest.mark.parametrize("launches", [1, 40, 400])
def test_launches_do_not_count(machine, launches):
    """The device has each kernel done before the host can launch the next: only it is timed."""

    def function():
        for _ in range(launches):
            machine.launch(10e-6, 2e-6)

    found = measure({"function": function}, "cuda", rounds=5)["function"]
    assert found.median == pytest.approx(launches * 2e-6)
    assert found.rounds == 5


def test_a_function_that_waits_is_timed_all_the_same(machine):
    def function():
        machine.launch(10e-6, 50e-6)
        machine.wait()
        machine.launch(10e-6, 50e-6)

    found = measure({"function": function}, "cuda", rounds=3)["function"]
    assert found.median == pytest.approx(110e-6)  # the second launch is seen


def test_rounds_of_functions_alternate():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = samples(functions, "cpu", rounds=3)
    assert "".join(calls) == "abababab"  # the first of each warms up
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_timing_is_the_median_and_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(median=3.0, low=2.0, high=4.0, rounds=5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize(
    ("case", "microseconds"),
    [
        (CausalAttention(B=64, T=512, p=0.1), 50 + 100),
        (DropoutAddLayerNorm(N=32768, p=0.1), 46.8 + 46.8),
        (LinearCrossEntropy(N=32768), 7740),
    ],
    ids=str,
)
def test_floors_are_the_published_ones(case, microseconds):
    """As worked out by hand for an H200: 4.3 TB/s, 790 TFLOP/s."""
    floors = case.floors(2, programs=132)
    both = [floors["both"]] if "both" in floors else [floors["forward"], floors["backward"]]
    assert 1e6 * sum(map(H200.seconds, both)) == pytest.approx(microseconds, rel=0.03)


def test_floor_without_dropout_has_no_bits():
    with_bits, without = (
        CausalAttention(B=64, T=512, p=p).floors(2, programs=132) for p in (0.1, 0.0)
    )
    bits = dropout_bits(64 * 12 * 512, 512)
    for direction in ("forward", "backward"):
        assert with_bits[direction].bytes - without[direction].bytes == bits
        assert with_bits[direction].flops == without[direction].flops


def test_flops_of_a_step():
    tokens = 64 * 512
    assert model_flops(tokens, 512, 768, 40478, 12) == pytest.approx(23.74e12, rel=1e-3)


@each_case
def test_oracle_in_parts_is_the_oracle(case, monkeypatch):
    tensors = cases.draw(case, "cpu", torch.float64)
    dout = torch.randn(case.out, dtype=torch.float64) if tensors.keys() - {"seed"} else None
    keep = case.keep(cases.seed("cpu"), 0, case.batch)
    whole = cases.results(lambda **t: case.reference(keep, **t), tensors, dout)
    monkeypatch.setattr(cases, "PART", case.intermediate())  # one item of the batch
    parts = cases.oracle(case, tensors, dout, torch.float64, "cpu")
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of SDPA, saying why it raises
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_case
def test_everyone_here_is_right(case, dtype):
    """Our op and PyTorch's; what is compiled is checked where it is timed."""
    here = [
        i for i in implementations(case)
        if i.absence(case.op, "cpu") is None and i.name != "torch.compile"
    ]  # fmt: skip
    comparison = compare(case, here, "cpu", dtype, rounds=1)
    assert not comparison.failures
    without_dropout = {"SDPA flash"} if case.p else set()  # on a CPU
    assert comparison.problems.keys() <= without_dropout
    timed = {(r.direction, r.implementation) for r in comparison.results if r.kind != "yardstick"}
    names = {i.name for i in here} - comparison.problems.keys()
    assert timed == {(d, name) for d in case.directions for name in names}


def test_a_peers_gradient_of_qkv_is_written_once():
    """SDPA on a GPU, as on a CPU, returns those of q, k and v as one copy can join them."""

    class Copies(TorchDispatchMode):
        written = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function._schema.name in ("aten::cat", "aten::stack", "aten::clone", "aten::copy_"):
                self.written += out.numel()
            return out

    case = CausalAttention(B=2, T=20, H=2, D=16)
    tensors = cases.draw(case, "cpu", torch.bfloat16)
    model = train_step.build("plain PyTorch", train_step.config(0.0, **TINY_MODEL))
    ids = torch.zeros(2, 20, dtype=torch.int64)
    for out, qkv in (
        (sdpa(SDPBackend.FLASH_ATTENTION, case, **tensors), tensors["qkv"]),
        (train_step.loss_of(model, ids), torch.empty(2, 20, 3 * 32)),
    ):
        with Copies() as copies:
            out.sum().backward()
        assert copies.written == qkv.numel()


def test_what_is_wrong_is_not_timed():
    case = LayerNorm(N=37, C=48)
    right = Implementation("right", lambda case, x, w, b: reference.layer_norm(x, w, b, 1e-5))
    calls = {"slightly off": 0, "drops a row": 0, "no gradient of b": 0, "raises": 0}

    def wrong(name, function, **kwargs):
        def run(case, **tensors):
            calls[name] += 1
            return function(right.run(case, **tensors), **tensors)

        return Implementation(name, run, **kwargs)

    comparison = compare(
        case,
        [
            right,
            wrong("slightly off", lambda y, **_: 1.001 * y),
            wrong("drops a row", lambda y, **_: torch.cat([y[:-1], 0 * y[-1:]])),
            wrong("no gradient of b", lambda y, b, **_: y - b + b.detach(), backend="portable"),
            wrong("raises", lambda y, **_: 1 / 0),
        ],
        "cpu", torch.float32, rounds=2,
    )  # fmt: skip
    assert comparison.problems.keys() == {"slightly off", "drops a row", "raises"}
    assert comparison.failures.keys() == {"no gradient of b"}
    assert {r.implementation for r in comparison.results} == {"right"}
    assert set(calls.values()) == {1}


def test_an_evaluation_has_no_tensor_that_wants_a_gradient():
    """Liger's loss computes the gradients in forward wherever its input requires one."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, w, targets):
            asked.append(h.requires_grad or w.requires_grad)
            return h.sum()

    asked, case = [], LinearCrossEntropy(N=3, C=8, V=5)
    tensors = cases.draw(case, "cpu", torch.float32)
    call(case, lambda case, h, w, targets: Loss.apply(h, w, targets), tensors, None, "forward")()
    assert asked == [False]


def test_cut_cross_entropy_computes_all_of_the_gradient(monkeypatch):
    """By default it left out half of the tiles at V = 128256; the check of peers allowed that."""
    (peer,) = (p for p in PEERS["linear_cross_entropy"] if p.name == "cut-cross-entropy")
    module = SimpleNamespace(linear_cross_entropy=lambda *args, **options: options)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    assert peer.run(None, h=None, w=None, targets=None) == {"filter_eps": None}


def test_models_are_compiled_as_if_no_op_had_been_compared():
    config = torch._functorch.config
    with config.patch(donated_buffer=True):
        compare(LayerNorm(N=2, C=8), [], "cpu", torch.float32, rounds=1)
        assert config.donated_buffer


def test_neither_the_interpreter_nor_the_checked_build_is_timed():
    for case in TINY:
        here = [
            i.backend for i in implementations(case) if i.ours and not i.absence(case.op, "cpu")
        ]
        assert set(here) == {"portable"}


def test_missing_package_is_named():
    missing = Implementation("peer", print, on_cpu=True, package="no-such-package")
    assert missing.absence("layer_norm", "cpu") == "no-such-package is not installed"
    assert Implementation("peer", print).absence("layer_norm", "cpu") == "needs a GPU"
    assert {op for op, peers in PEERS.items() if peers} == {c.op for c in GPT1} - {"dropout_mask"}


def _result(name, kind, seconds):
    floors = Floor(3_000_000, 8_000_000), Floor(1_000_000)
    return Result("case", "both", name, kind, tuple(seconds), floors, peak_bytes=None)


def test_figures_of_a_line():
    machine = Ceilings(bandwidth=1e9, rate=1e9)
    results = [
        _result("ours", "ours", [0.02, 0.01, 0.03]),
        _result("peer", "peer", [0.04]),
        _result("best peer", "peer", [0.03]),
        _result("products", "yardstick", [0.001]),
    ]
    ours, _, best, products = figures(results, machine)
    assert ours.seconds == 0.02
    assert ours.bytes_per_s == pytest.approx(4e6 / 0.02)
    assert ours.flops_per_s == pytest.approx(8e6 / 0.02)
    assert ours.share_of_floor == pytest.approx((0.008 + 0.001) / 0.02)  # products, then bytes
    assert ours.times_best_peer == pytest.approx(1.5)
    assert best.times_best_peer == 1.0
    assert products.times_best_peer == pytest.approx(30)
    assert figures(results[:1], machine)[0].times_best_peer is None
    large = replace(ours, seconds=12.3456, peak_bytes=2_000_000)
    assert cells(large) == (
        "ours", "12,345,600", "15,000-25,000", "400 M", "200 M", "45.0%", "1.50", "2",
    )  # fmt: skip
    assert cells(replace(ours, flops_per_s=0.0))[3] == ""


def test_figures_of_a_model():
    results = [
        ModelResult(name, kind, (seconds,), tokens=1000, flops=4 * 10**9, peak_bytes=None)
        for name, kind, seconds in [
            ("gpt1_kernels", "ours", 2.0), ("transformers", "peer", 8.0),
            ("compiled transformers", "peer", 3.0), ("bare products", "yardstick", 1.0),
        ]
    ]  # fmt: skip
    ours, *_ = model_figures(results, rate=10**10)
    assert ours.tokens_per_s == 500
    assert ours.flops_per_s == 2e9
    assert ours.utilisation == pytest.approx(0.2)
    assert ours.times_best_peer == 1.5
    assert ours.times_transformers == 4.0
    again = replace(results[-1], seconds=(0.5,))  # as captured updates have it beside them
    assert [f.tokens_per_s for f in model_figures([*results, again], 10**10)][-2:] == [1000, 2000]


def test_columns_are_aligned_and_empty_ones_left_out():
    rows = [("", "µs", "peak MB"), ("portable", "7", ""), ("eager", "12", "")]
    assert aligned(rows) == ["          µs", "portable   7", "eager     12"]


def test_rounds_reach_the_record_of_pytest_benchmark(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "from benchmarks.replay import clock, replay\n"
        "@pytest.mark.benchmark(timer=clock)\n"
        "def test_one(benchmark):\n"
        "    replay(benchmark, [0.25, 0.5, 4.0])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir"]
    options = [tmp_path, tmp_path, f"--benchmark-json={tmp_path / 'found.json'}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    subprocess.run([*command, *options], check=True, capture_output=True, env=environment)
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert found["stats"]["data"] == [0.25, 0.5, 4.0]
    assert found["stats"]["median"] == 0.5


LITTLE = Size("little", 2, 16, {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2})


@pytest.mark.parametrize("library", ["gpt1_kernels", "plain PyTorch", "transformers"])
def test_sides_of_a_step_are_the_same_model(library):
    if library == "transformers":
        pytest.importorskip("transformers")
    torch.manual_seed(1)
    config, ids = LITTLE.config(0.0), LITTLE.draw("cpu")
    compare_models.check(Side(library), config, "fp32", ids, compare_models.oracle(config, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda loss: 1.001 * loss, "loss"), (lambda loss: loss + (loss - loss.detach()), "gradient")],
    ids=["loss", "gradients"],
)
def test_a_side_that_is_another_model_is_refused(monkeypatch, change, message):
    loss_of = train_step.loss_of
    monkeypatch.setattr(train_step, "loss_of", lambda *args: change(loss_of(*args)))
    config, ids = LITTLE.config(0.0), LITTLE.draw("cpu")
    expected = compare_models.oracle(config, ids)
    with pytest.raises(AssertionError, match=message):
        compare_models.check(Side("plain PyTorch"), config, "fp32", ids, expected)


def test_a_side_takes_as_many_sequences_as_fit(monkeypatch):
    size = Size(
        "tiny", B=6, T=8, overrides={"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    )
    make_calls = train_step.make_calls

    def making(side, config, dtype, input_ids):
        if side.library == "plain PyTorch" and len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return make_calls(side, config, dtype, input_ids)

    monkeypatch.setattr(compare_models, "make_calls", making)
    sides = {"ours": Side("gpt1_kernels"), "plain": Side("plain PyTorch")}
    found = compare_models.compare_models(size, "fp32", 0.0, "cpu", ("step",), 1, sides)
    ours, plain, products = found.results["step"]
    assert not found.problems
    assert (ours.tokens, plain.tokens, products.tokens) == (48, 8, 48)
    assert ours.flops == 6 * plain.flops
    line = model_figures([ours, replace(plain, seconds=ours.seconds)], rate=1e9)[0]
    assert line.times_best_peer == pytest.approx(6)


def test_a_side_has_to_fit_beside_what_its_first_update_makes(monkeypatch):
    """The optimizer's state is made when the activations are gone; the next update has both."""
    calls = []

    def making(side, config, dtype, input_ids):
        def step():
            calls.append(len(input_ids))
            if len(input_ids) > 2 and calls.count(len(input_ids)) == 2:
                raise torch.OutOfMemoryError

        return {"step": step}

    monkeypatch.setattr(compare_models, "make_calls", making)
    ids = torch.zeros(4, 8, dtype=torch.int64)
    _, tokens = compare_models._fitting_calls(Side("transformers"), None, "fp32", ids, "step")
    assert tokens == 16
    assert calls == [4, 4, 2, 2]


def test_who_fails_leaves_no_tensors(monkeypatch):
    """The next side, and whoever keeps the comparison, has their memory again."""
    held, alive = [], []

    def making(side, config, dtype, input_ids):
        alive.append(any(each() is not None for each in held))
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        try:
            raise KeyError("within")
        except KeyError as problem:
            raise ValueError("as asked") from problem

    def run(case, **tensors):
        held.append(weakref.ref(tensors["x"]))
        raise ValueError("as asked")

    monkeypatch.setattr(compare_models, "make_calls", making)
    sides = {"one": Side("plain PyTorch"), "two": Side("plain PyTorch")}
    found = compare_models.compare_models(LITTLE, "fp32", 0.0, "cpu", ("step",), 1, sides)
    peer = Implementation("peer", run)
    compared = compare(LayerNorm(N=2, C=8), [peer], "cpu", torch.float32, rounds=1)
    assert alive == [False, False]
    assert [each() for each in held] == [None] * 3
    for problem in (*found.problems.values(), *compared.problems.values()):
        assert str(problem) == "as asked"
        assert "in making" in problem.__notes__[0] or "in run" in problem.__notes__[0]


def test_the_products_have_their_memory_before_a_side_takes_the_rest(monkeypatch):
    order = []

    def noting(name, function):
        def run(*args):
            order.append(name)
            return function(*args)

        monkeypatch.setattr(compare_models, name, run)

    noting("bare_products", compare_models.bare_products)
    noting("make_calls", compare_models.make_calls)
    sides = {"ours": Side("gpt1_kernels")}
    compare_models.compare_models(LITTLE, "fp32", 0.0, "cpu", ("step",), 1, sides)
    assert order == ["bare_products", "make_calls"]


def test_the_products_have_aligned_rows():
    """As those of the loss alone: GPT-1's vocabulary is no multiple of 8."""
    widths = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function._schema.name in ("aten::mm", "aten::bmm"):
                widths.update(max(t.stride()[-2:]) for t in (*args, out))
            return out

    products = train_step.bare_products(LITTLE.config(0.0), "bf16", LITTLE.draw("cpu"))
    with Products():
        products()
    assert all(width % 8 == 0 for width in widths), widths


@pytest.mark.parametrize("library", ["gpt1_kernels", "plain PyTorch", "transformers"])
def test_weights_are_drawn_where_they_stay(library):
    """A CPU takes seconds for those of GPT-1, and a comparison builds a dozen models."""
    if library == "transformers":
        pytest.importorskip("transformers")

    class OnCPU(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu":
                self.largest = max(self.largest, out.numel())
            return out

    with OnCPU() as on_cpu:
        model = train_step.build(library, LITTLE.config(0.0), "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert on_cpu.largest < 50 * 16


def test_a_captured_update_is_measured_without_its_memory(monkeypatch):
    """A graph's is kept: replays allocate nothing."""
    cuda_graphs.stand_in(monkeypatch)
    monkeypatch.setattr(compare_models, "peak_memory", lambda function, device: 1)
    sides = {
        "eager": Side("gpt1_kernels", backend="portable"),
        "captured": Side("gpt1_kernels", backend="portable", captured=True),
    }
    with unchecked_ids("portable"):
        found = compare_models.compare_models(LITTLE, "fp32", 0.1, "cpu", ("step",), 2, sides)
    assert not found.problems
    peaks = {result.implementation: result.peak_bytes for result in found.results["step"]}
    assert peaks == {"eager": 1, "captured": None, "bare products": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")
def test_peak_memory_is_that_of_the_process_itself():
    """`getrusage` tells a process of the peak of the one that started it."""
    large = bytearray(2**28)  # more than a Python that imports no PyTorch takes
    code = inspect.getsource(train_step._peak_bytes)
    code = f"import re\nfrom pathlib import Path\n{code}\nprint(_peak_bytes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < len(large) <= train_step._peak_bytes()
