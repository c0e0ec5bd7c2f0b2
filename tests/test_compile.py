"""torch.compile and the fakes behind it: rows 21 and 22 of the edge cases."""

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launchers import OVER_LENGTHS
from gpt1_kernels import GPT1LMHeadModel, GPT1TaskModel, ops, use_backend
from gpt1_kernels.task_model import HEAD_KEY
from tests.cases import (
    DEVICE,
    PARITY,
    SEED,
    assert_same,
    backends_of,
    cast,
    causal_attention_qkvpacked,
    inputs_for,
    on_backends,
    results,
    upstream,
)
from tests.models import T, config, randomised, tokens, with_dropout

SMALL_CASES = [
    *(
        next(case for case in PARITY if case.name.startswith(prefix))
        for prefix in (
            "layer_norm-columns",
            "dropout_add_layer_norm-no-bias",
            "dropout_add_layer_norm-no-dropout",
            "causal_attention-key-value-cache",
            "causal_attention-left-padding",
            "gelu_ffn-bias",
            "gelu_ffn-bias-left-out",
            "embedding-types",
            "linear_cross_entropy-token-weight",
            "linear_cross_entropy-none",
        )
    ),
    causal_attention_qkvpacked("small", 2, 21, 2, 16, 0.1),
]


class LowLevelCalls(TorchDispatchMode):
    """Collects the calls of the library's own low-level ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gpt1_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@on_backends(SMALL_CASES)
def test_row21_opcheck(case, backend):
    """Schemas are true, and fakes give the shapes, dtypes and strides of the real outputs."""
    collected = LowLevelCalls()
    with use_backend(backend):
        inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        with collected:
            out = case.fused(**leaves)
            out.backward(dout.to(out.dtype))
    check_calls(collected)


@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_row21_opcheck_of_axes_swapped_in_memory(backend):
    """Portable kept the sum for backward in the layout of its terms; compiled code refused it."""
    x = torch.randn(5, 3, 16, device=DEVICE).transpose(0, 1).requires_grad_()
    collected = LowLevelCalls()
    with use_backend(backend), collected:
        ops.dropout_add_layer_norm(x, x, x[0, 0], x[0, 0]).sum().backward()
    check_calls(collected)


def check_calls(collected: LowLevelCalls) -> None:
    assert {function._schema.name.rsplit("_", 1)[-1] for function, _ in collected.calls} >= {"fwd"}
    for function, args in collected.calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


@on_backends(SMALL_CASES)
def test_row21_fullgraph(case, backend):
    """`backend="aot_eager"` traces forward and backward without generating code."""
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **leaves: case.fused(**leaves), fullgraph=True, backend="aot_eager"
    )
    with use_backend(backend):
        expected, actual = (results(f, inputs, dout) for f in (case.fused, compiled))
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_row21_a_number_of_tokens_that_only_the_data_have(backend):
    """In fp16 the size of `token_weight` was asked for, and no graph came of it."""
    h = torch.randn(12, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    targets, weights = torch.arange(12, device=DEVICE), torch.rand(12, device=DEVICE)

    def loss_of(chosen):
        return ops.linear_cross_entropy(h[chosen], h, targets[chosen], token_weight=weights[chosen])

    torch._dynamo.reset()
    with use_backend(backend), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        for chosen in (targets > 4, targets > 99):
            assert torch.equal(compiled(chosen), loss_of(chosen))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.causal_attention(x, x, x),
        lambda x: ops.dropout_add_layer_norm(x, x, x[0, 0, 0], x[0, 0, 0]),
        lambda x: ops.embedding(torch.arange(2, device=DEVICE).view(1, 2), x[0, 0], x[0, 0]),
    ],
    ids=["causal_attention", "dropout_add_layer_norm", "embedding"],
)
def test_row21_one_tensor_given_twice(call):
    x, gradients = torch.randn(1, 3, 2, 16, device=DEVICE, requires_grad=True), []
    torch._dynamo.reset()
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        gradients += torch.autograd.grad(function(x).square().sum(), x)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("model_config", "compiler"),
    [
        pytest.param(config(), "aot_eager", id="plain"),
        pytest.param(with_dropout(), "inductor", id="dropout"),  # of which plain has all but masks
    ],
)
def test_row21_the_model_compiles_without_a_break(model_config, compiler):
    model, ids = randomised(GPT1LMHeadModel(model_config)), tokens(2, T)
    seeds = model.dropout_stream.seeds(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    losses, gradients = [], []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(ids, labels=ids, dropout_seeds=seeds).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("head", ["sum", "choice"])
def test_row21_the_fine_tuned_model_compiles_without_a_break(head):
    model = randomised(GPT1TaskModel(with_dropout(extra={HEAD_KEY: head})))
    inputs = {
        "input_ids": tokens(4, T),
        "extract": torch.tensor([T - 1, 5, 9, 3], device=DEVICE),
        "members": torch.tensor([[0, 1], [2, 3]], device=DEVICE),
        "lm_targets": tokens(4, T),
        "lm_weight": torch.ones(4, T, device=DEVICE),
        "dropout_seeds": model.dropout_stream.seeds(0),
    }
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = forward(**inputs)
        (out.logits.square().sum() + out.lm_loss).backward()
        results.append([out.logits, out.lm_loss, *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_row22_changing_lengths_compile_once_a_class():
    """The classes: the first length, any length, and any length whose keep bits fit one word."""
    w = torch.randn(16, device=DEVICE)
    qkv = torch.randn(2, 40, 48, device=DEVICE)

    def call(x, row_offset):
        seed = SEED
        y = ops.causal_attention_qkvpacked(x, 2, dropout_p=0.1, seed=seed, row_offset=row_offset)
        return ops.dropout_add_layer_norm(y, y, w, w, 1e-5, 0.1, seed, row_offset=row_offset)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for length in (40, 33, 17, 16, 9, 21, 30, 35, 39):
        x = qkv[:, :length]
        assert torch.equal(compiled(x, 2 * length), call(x, 2 * length))
    assert counter.frame_count == 3


def specialisations() -> int:
    """How many times Triton has compiled a kernel of ours."""
    from triton.runtime.jit import JITFunction

    names = [name for name in sys.modules if name.startswith("gpt1_kernels.backends.triton.")]
    values = [value for name in names for value in vars(sys.modules[name]).values()]
    kernels = {value for value in values if isinstance(value, JITFunction)}
    return sum(len(c) for kernel in kernels for c, *_ in kernel.device_caches.values())


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", OVER_LENGTHS, ids=lambda op: op.__name__)
def test_row22_triton_compiles_nothing_for_a_new_length(op):
    with torch.device(DEVICE):
        for length in (32, 33, 512):  # of each class that words of dropout bits in a row have
            op(length, torch.bfloat16)
        before = specialisations()
        for length in (1, 16, 17, 100, 1000, 1024):
            op(length, torch.bfloat16)
    assert 0 < before == specialisations()
