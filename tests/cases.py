"""The op calls that the tests share: one a code path, with its oracle from `reference.py`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gpt1_kernels import errors, ops, reference, use_backend
from gpt1_kernels.backends import BACKENDS, _takes_dtype, launches, unavailable_reason
from gpt1_kernels.numerics import assert_close
from gpt1_kernels.rng import keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
bf16_at_least = pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(
            pytest.param(dtype, marks=[pytest.mark.slow] if DEVICE == "cpu" else [])
            for dtype in (torch.float16, torch.float32)
        ),
    ],
    ids=str,
)
"""For sizes that take simulated kernels seconds: there the other dtypes are slow tests."""
SEED = torch.tensor([12345678901234, (3 << 32) + 7], device=DEVICE)
UNORDERED = BACKENDS if DEVICE == "cuda" else ("portable",)
"""The backends that may do things in another order the next time; simulated kernels do not."""
P = 0.1
LATER = 2**31 - 3  # a row_offset with which a call goes on beyond what int32 holds


@dataclass(frozen=True, eq=False)
class Case:
    """A call of an op.

    `inputs` are fp32 tensors by argument name, all of which get gradients; `fused` and `reference`
    take them as keywords and return one tensor.
    """

    name: str
    op: str
    inputs: dict[str, Tensor]
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()
    """The inputs that may be fp32 beside activations of another dtype."""


def results(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dout: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and all gradients, under "out" and the inputs' names; dout is 1 unless given."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def cast(case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a case in these dtypes."""
    return {
        name: x.to(parameter_dtype if name in case.parameters else dtype)
        for name, x in case.inputs.items()
    }


def upstream(case: Case, dtype: torch.dtype) -> Tensor:
    """A random upstream gradient, rounded to dtype."""
    with torch.no_grad():
        out = case.reference(**case.inputs)
    return torch.randn(out.shape, generator=_generator(case.name, 1)).to(out.device, dtype)


def oracle_of(case: Case, inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    return results(case.reference, {k: x.double() for k, x in inputs.items()}, dout)


def check_parity(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    dout: Tensor | None = None,
) -> None:
    """Holds a backend's output and gradients to the rule of `numerics`, and sees that it ran."""
    inputs = cast(case, dtype, parameter_dtype or dtype)
    dout = upstream(case, dtype) if dout is None else dout
    before = sum(n for (name, _), n in launches.items() if name == backend)
    with use_backend(backend):
        actual = results(case.fused, inputs, dout)
    assert sum(n for (name, _), n in launches.items() if name == backend) > before
    plain = results(case.reference, {k: x.to(dtype) for k, x in inputs.items()}, dout)
    oracle = oracle_of(case, inputs, dout)
    for name, value in actual.items():
        if name != "out":
            assert value.dtype == inputs[name].dtype, name
        assert_close(name, value, plain[name], oracle[name], dtype)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises AssertionError unless all that is expected is there, bit for bit."""
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def check_repeatable(case: Case, backend: str) -> None:
    """Two runs in bf16 are bit-equal; worth asking `UNORDERED` backends alone."""
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    with use_backend(backend):
        first, second = (results(case.fused, inputs, dout) for _ in range(2))
    assert_same(second, first)


def on_backends(cases: Iterable[Case], among: Collection[str] = BACKENDS):
    """Parametrises a test over (case, backend) where the backend serves the case's op."""
    return pytest.mark.parametrize(
        ("case", "backend"),
        [
            pytest.param(case, backend, id=f"{case.name}-{backend}")
            for case in cases
            for backend in backends_of(case.op)
            if backend in among
        ],
    )


def backends_of(op: str) -> list[str]:
    return [name for name in BACKENDS if unavailable_reason(name, op, DEVICE) is None]


def widest_dtype(backend: str, op: str) -> torch.dtype:
    """fp32, or bf16 where a backend refuses it: conftest.py leaves out refused dtypes."""
    return next(dtype for dtype in DTYPES if _takes_dtype(backend, op, dtype))


def inputs_for(backend: str, case: Case) -> dict[str, Tensor]:
    """The inputs of a case in the widest dtype that a backend takes."""
    dtype = widest_dtype(backend, case.op)
    return cast(case, dtype, dtype)


def check_ids_as_on_a_gpu(backend: str) -> Callable[..., Tensor | None]:
    """A `check_ids` that raises nothing: kernels look at ids themselves, portable has a mask."""

    def noted(op: str, ids: Tensor, bound: int, allowed: int | None = None) -> Tensor:
        valid = (ids >= 0) & (ids < bound) | (ids == (0 if allowed is None else allowed))
        errors.error_record(op, bound, ids.device).note(ids, valid)
        return valid

    return noted if backend == "portable" else lambda *_: None


def _generator(name: str, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)


def _draw(name: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = _generator(name)
    return {k: torch.randn(s, generator=generator).to(DEVICE) for k, s in shapes.items()}


def _keep(p: float, *shape: int, row_offset: int = 0) -> Tensor | None:
    if p == 0.0:
        return None
    rows = torch.Size(shape[:-1]).numel()
    return keep_mask(SEED, rows, shape[-1], p, row_offset).view(shape)


def _dropout(p: float, row_offset: int = 0) -> dict:
    return {"dropout_p": p, "seed": SEED if p > 0.0 else None, "row_offset": row_offset}


def layer_norm(path: str, N: int, C: int) -> Case:
    name = f"layer_norm-{path}"
    inputs = _draw(name, x=(N, C), w=(C,), b=(C,))
    inputs["x"] = inputs["x"] * 2 + 3
    return Case(name, "layer_norm", inputs, ops.layer_norm, reference.layer_norm, ("w", "b"))


def dropout_add_layer_norm(
    path: str, N: int, C: int, p: float, x_bias: bool = True, row_offset: int = 0
) -> Case:
    name = f"dropout_add_layer_norm-{path}"
    shapes = {"x": (N, C), "residual": (N, C), "w": (C,), "b": (C,)}
    if x_bias:
        shapes["x_bias"] = (C,)
    return Case(
        name,
        "dropout_add_layer_norm",
        _draw(name, **shapes),
        partial(ops.dropout_add_layer_norm, **_dropout(p, row_offset)),
        partial(reference.dropout_add_layer_norm, keep=_keep(p, N, C, row_offset=row_offset), p=p),
        ("w", "b", "x_bias"),
    )


def forked(site: Case) -> Case:
    """A residual site whose result has two readers, each with a gradient of its own."""

    def read_twice(y: Tensor, residual: Tensor) -> Tensor:
        return y + residual.flip(-1)

    def reference_read_twice(**inputs: Tensor) -> Tensor:
        y = site.reference(**inputs)
        return read_twice(y, y)

    return replace(
        site,
        name=f"{site.name}-forked",
        fused=lambda **inputs: read_twice(*site.fused(**inputs, fork=True)),
        reference=reference_read_twice,
    )


def causal_attention(
    path: str, B: int, Tq: int, Tk: int, H: int, D: int, p: float = 0.0, padding=None, scale=None,
    row_offset: int = 0,
) -> Case:  # fmt: skip
    name = f"causal_attention-{path}"
    first_key = None if padding is None else torch.tensor(padding, dtype=torch.int32, device=DEVICE)
    options = {"scale": scale, "first_key": first_key}
    keep = _keep(p, B, H, Tq, Tk, row_offset=row_offset * H)
    return Case(
        name,
        "causal_attention",
        _draw(name, q=(B, Tq, H, D), k=(B, Tk, H, D), v=(B, Tk, H, D)),
        partial(ops.causal_attention, **options, **_dropout(p, row_offset)),
        partial(reference.causal_attention, **options, keep=keep, p=p),
    )


def causal_attention_qkvpacked(path: str, B: int, T: int, H: int, D: int, p: float = 0.0) -> Case:
    name = f"causal_attention_qkvpacked-{path}"
    keep = _keep(p, B, H, T, T)

    def unpacked(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, 3, H, D).unbind(2)
        return reference.causal_attention(q, k, v, keep=keep, p=p).flatten(2)

    return Case(
        name,
        "causal_attention",
        _draw(name, qkv=(B, T, 3 * H * D)),
        partial(ops.causal_attention_qkvpacked, n_head=H, **_dropout(p)),
        unpacked,
    )


def gelu_ffn(path: str, N: int, C: int, F: int, b_proj: bool = True) -> Case:
    name = f"gelu_ffn-{path}"
    shapes = {"x": (N, C), "w_fc": (C, F), "b_fc": (F,), "w_proj": (F, C)}
    if b_proj:
        shapes["b_proj"] = (C,)
    inputs = _draw(name, **shapes)
    for weight in ("w_fc", "w_proj"):
        inputs[weight] = inputs[weight] / inputs[weight].shape[0] ** 0.5
    return Case(name, "gelu_ffn", inputs, ops.gelu_ffn, reference.gelu_ffn, ("b_fc", "b_proj"))


def embedding(
    path: str, B: int, T: int, V: int, C: int, p: float = 0.0, ids=None, types=False, offset=None,
    row_offset: int = 0,
) -> Case:  # fmt: skip
    name = f"embedding-{path}"
    generator = _generator(name, 2)
    drawn = torch.randint(V, (2, B, T), generator=generator)
    ids = (drawn[0] if ids is None else torch.as_tensor(ids).expand(B, T)).to(DEVICE)
    token_type_ids = drawn[1].to(DEVICE) if types else None
    position_ids = torch.arange(T, device=DEVICE)
    keep = _keep(p, B, T, C, row_offset=row_offset)

    def added(w_token: Tensor, w_position: Tensor) -> Tensor:
        out = w_token[ids] + w_position[position_ids + (offset or 0)]
        out = out if token_type_ids is None else out + w_token[token_type_ids]
        return reference.dropout(out, keep, p)

    fused = partial(
        ops.embedding, ids, token_type_ids=token_type_ids,
        position_ids=None if offset is None else position_ids + offset, **_dropout(p, row_offset),
    )  # fmt: skip
    inputs = _draw(name, w_token=(V, C), w_position=(T + 4, C))
    return Case(name, "embedding", inputs, fused, added)


def linear_cross_entropy(
    path: str, N: int, C: int, V: int, reduction="mean", ignored=0, weighted=False
) -> Case:
    name = f"linear_cross_entropy-{path}"
    inputs = _draw(name, h=(N, C), w=(V, C))
    inputs["w"] = inputs["w"] / C**0.5  # logits of unit variance
    generator = _generator(name, 2)
    targets = torch.randint(V, (N,), generator=generator)
    targets[:ignored] = -100
    weight = torch.rand(N, generator=generator).to(DEVICE) if weighted else None
    targets = targets.to(DEVICE)
    options = {"reduction": reduction, "token_weight": weight}

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return reference.cross_entropy(h @ w.t(), targets, **options)

    fused = partial(ops.linear_cross_entropy, targets=targets, **options)
    return Case(name, "linear_cross_entropy", inputs, fused, plain)


PARITY = [
    layer_norm("less-than-eight-columns", 3, 3),
    layer_norm("columns-no-power-of-two", 5, 80),
    layer_norm("programs-walk-over-tiles", 300, 128),
    layer_norm("last-tile-of-one-row", 33, 768),
    layer_norm("one-row-a-tile", 3, 2500),
    dropout_add_layer_norm("no-dropout", 37, 80, 0.0),
    dropout_add_layer_norm("no-bias", 37, 80, P, x_bias=False),
    dropout_add_layer_norm("programs-walk-over-tiles", 300, 128, P),
    dropout_add_layer_norm("gpt1-width", 33, 768, P),
    dropout_add_layer_norm("all-dropped", 5, 48, 1.0),
    dropout_add_layer_norm("later-rows", 9, 48, P, row_offset=LATER),
    forked(dropout_add_layer_norm("gpt1-width", 33, 768, P)),
    forked(dropout_add_layer_norm("unaligned", 9, 81, 0.0)),
    causal_attention("one-position", 2, 1, 1, 2, 64),
    causal_attention("last-block-of-one-query", 1, 129, 129, 2, 64),
    causal_attention("head-size-80", 1, 40, 40, 2, 80),
    causal_attention("dropout", 2, 130, 130, 2, 32, P),
    causal_attention("key-value-cache", 2, 3, 70, 2, 32, P),
    causal_attention("left-padding", 3, 40, 40, 2, 32, P, padding=[0, 7, 40]),
    causal_attention("scale", 1, 9, 9, 2, 16, scale=0.5),
    causal_attention("later-rows", 2, 9, 9, 2, 16, P, row_offset=LATER // 2),
    causal_attention_qkvpacked("dropout", 2, 70, 3, 16, P),
    causal_attention_qkvpacked("gpt1-head", 1, 130, 2, 64),
    gelu_ffn("bias", 37, 48, 192),
    gelu_ffn("bias-left-out", 37, 48, 192, b_proj=False),
    gelu_ffn("one-row", 1, 80, 100),
    embedding("positions-by-order", 2, 33, 50, 48),
    embedding("dropout", 2, 33, 50, 80, P),
    embedding("later-rows", 2, 9, 50, 48, P, row_offset=LATER),
    embedding("types-and-positions", 2, 9, 50, 48, P, types=True, offset=3),
    embedding("one-id-fills-the-batch", 8, 64, 50, 48, ids=7),
    linear_cross_entropy("mean", 37, 48, 1000),
    linear_cross_entropy("sum", 37, 48, 1000, "sum"),
    linear_cross_entropy("none", 37, 48, 1000, "none"),
    linear_cross_entropy("ignored", 37, 48, 1000, ignored=11),
    linear_cross_entropy("token-weight", 37, 48, 1000, ignored=11, weighted=True),
    linear_cross_entropy("one-row", 1, 16, 3),
]
