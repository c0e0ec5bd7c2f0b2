"""What is timed: every op at GPT-1's sizes and around them, with its oracle and its floor.

A case is an op with its sizes, named as in `benchmarks.roofline`. Its tensors go to every
implementation by the names of the reference's arguments; floating-point ones get gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.roofline import Floor
from gpt1_kernels import reference
from gpt1_kernels.rng import keep_mask, unpack_bits

SEED = (12345678901234, (3 << 32) + 7)
PART = 2**26  # elements of the largest intermediate of a part of the oracle


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one size."""

    op: ClassVar[str]
    batched: ClassVar[tuple[str, ...]] = ()
    """The tensors whose first axis is the batch: rows, or sequences."""
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward", "both")
    forward_saves: ClassVar[bool] = True
    """Whether "forward" is timed as in training, ready for a backward."""
    p: float = 0.0

    def __str__(self) -> str:
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        p = sizes.pop("p")
        sizes |= {"p": p} if p else {}
        return " ".join([self.op, *(f"{k}={v}" for k, v in sizes.items())])

    def without_dropout(self) -> Case:
        """The same call for an implementation that draws bits of its own."""
        return replace(self, p=0.0)

    @property
    def batch(self) -> int:
        """The length of the first axis of the batched tensors."""
        return self.N

    @property
    def out(self) -> tuple[int, ...]:
        """The output's shape."""
        return self.N, self.C

    def draw(self) -> dict[str, Tensor]:
        """The tensors, fp32, on the default device."""
        raise NotImplementedError

    def keep(self, seed: Tensor, first: int, count: int) -> Tensor | None:
        """What dropout keeps of `count` items of the batch."""
        return None

    def reference(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        """The op in plain PyTorch, of a part of the batch; parts of a scalar are to be added."""
        raise NotImplementedError

    def intermediate(self) -> int:
        """Elements of the reference's largest intermediate for an item of the batch."""
        return self.C

    def floors(self, s: int, programs: int) -> dict[str, Floor]:
        """Of "forward" and "backward", for elements of s bytes."""
        raise NotImplementedError

    def comparable(self, out: Tensor) -> Tensor:
        """An op's output as the reference has it."""
        return out


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Case):
    op = "layer_norm"
    batched = ("x",)
    N: int
    C: int = 768

    def draw(self):
        return {"x": 2 * torch.randn(self.N, self.C) + 3, **_named("w b", self.C)}

    def reference(self, keep, x, w, b):
        return reference.layer_norm(x, w, b)

    def floors(self, s, programs):
        return {
            "forward": roofline.layer_norm_fwd(self.N, self.C, s, s),
            "backward": roofline.layer_norm_bwd(self.N, self.C, s, s, programs),
        }


@dataclass(frozen=True, kw_only=True)
class DropoutAddLayerNorm(Case):
    op = "dropout_add_layer_norm"
    batched = ("x", "residual")
    N: int
    C: int = 768

    def draw(self):
        return {**_named("x residual", self.N, self.C), **_named("x_bias w b", self.C)}

    def keep(self, seed, first, count):
        return keep_mask(seed, count, self.C, self.p, first) if self.p else None

    def reference(self, keep, x, residual, x_bias, w, b):
        return reference.dropout_add_layer_norm(
            x, residual, w, b, keep=keep, p=self.p, x_bias=x_bias
        )

    def floors(self, s, programs):
        return {
            "forward": roofline.dropout_add_layer_norm_fwd(self.N, self.C, s, s),
            "backward": roofline.dropout_add_layer_norm_bwd(self.N, self.C, s, s, programs),
        }


@dataclass(frozen=True, kw_only=True)
class CausalAttention(Case):
    """From qkv (B, T, 3C) to out (B, T, C), and back."""

    op = "causal_attention"
    batched = ("qkv",)
    B: int
    T: int
    H: int = 12
    D: int = 64

    @property
    def batch(self):
        return self.B

    @property
    def out(self):
        return self.B, self.T, self.H * self.D

    def draw(self):
        return _named("qkv", self.B, self.T, 3 * self.H * self.D)

    def keep(self, seed, first, count):
        if not self.p:
            return None
        rows = self.H * self.T
        bits = keep_mask(seed, count * rows, self.T, self.p, first * rows)
        return bits.view(count, self.H, self.T, self.T)

    def reference(self, keep, qkv):
        q, k, v = qkv.unflatten(-1, (3, self.H, self.D)).unbind(2)
        return reference.causal_attention(q, k, v, keep=keep, p=self.p).flatten(2)

    def intermediate(self):
        return self.H * self.T * self.T

    def floors(self, s, programs):
        sizes, dropout = (self.B, self.T, self.H, self.D, s), self.p > 0
        return {
            "forward": roofline.causal_attention_fwd(*sizes, dropout=dropout),
            "backward": roofline.causal_attention_bwd(*sizes, launches=1, dropout=dropout),
        }


@dataclass(frozen=True, kw_only=True)
class GeluFFN(Case):
    op = "gelu_ffn"
    batched = ("x",)
    N: int
    C: int = 768
    F: int = 3072

    def draw(self):
        return {
            "x": torch.randn(self.N, self.C),
            "w_fc": torch.randn(self.C, self.F) / self.C**0.5,
            "b_fc": torch.randn(self.F),
            "w_proj": torch.randn(self.F, self.C) / self.F**0.5,
            "b_proj": torch.randn(self.C),
        }

    def reference(self, keep, x, w_fc, b_fc, w_proj, b_proj):
        return reference.gelu_ffn(x, w_fc, b_fc, w_proj, b_proj)

    def intermediate(self):
        return self.F

    def floors(self, s, programs):
        return {
            "forward": roofline.gelu_ffn_fwd(self.N, self.C, self.F, s, s),
            "backward": roofline.gelu_ffn_bwd(self.N, self.C, self.F, s, s),
        }


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Case):
    """The mean loss; fused ones compute the gradients with it, so backward is not timed alone.

    "forward" is that of an evaluation, where nobody wants a gradient.
    """

    op = "linear_cross_entropy"
    batched = ("h", "targets")
    directions = ("forward", "both")
    forward_saves = False
    N: int
    C: int = 768
    V: int = 40478
    out = ()

    def draw(self):
        return {
            "h": torch.randn(self.N, self.C),
            "w": torch.randn(self.V, self.C) / self.C**0.5,
            "targets": torch.randint(self.V, (self.N,)),
        }

    def reference(self, keep, h, w, targets):
        return reference.cross_entropy(h @ w.t(), targets, reduction="sum") / self.N

    def intermediate(self):
        return self.V

    def floors(self, s, programs):
        return {
            "forward": roofline.linear_cross_entropy_fwd(self.N, self.C, self.V, s),
            "both": roofline.linear_cross_entropy(self.N, self.C, self.V, s),
        }


@dataclass(frozen=True, kw_only=True)
class Embedding(Case):
    op = "embedding"
    batched = ("ids",)
    B: int
    T: int
    C: int = 768
    V: int = 40478

    @property
    def batch(self):
        return self.B

    @property
    def out(self):
        return self.B, self.T, self.C

    def draw(self):
        tables = {"w_token": torch.randn(self.V, self.C), "w_position": torch.randn(self.T, self.C)}
        return {"ids": torch.randint(self.V, (self.B, self.T)), **tables}

    def keep(self, seed, first, count):
        if not self.p:
            return None
        return keep_mask(seed, count * self.T, self.C, self.p, first * self.T).view(
            count, self.T, self.C
        )

    def reference(self, keep, ids, w_token, w_position):
        return reference.dropout(w_token[ids] + w_position, keep, self.p)

    def intermediate(self):
        return self.T * self.C

    def floors(self, s, programs):
        N = self.B * self.T
        distinct = round(self.V * (1 - (1 - 1 / self.V) ** N))  # on average
        return {
            "forward": roofline.embedding_fwd(N, self.T, self.C, s, read=distinct),
            "backward": roofline.embedding_bwd(N, self.V, self.T, self.C, s),
        }


@dataclass(frozen=True, kw_only=True)
class DropoutMask(Case):
    """The bits of attention, of the causal half."""

    op = "dropout_mask"
    directions = ("forward",)
    B: int
    T: int
    H: int = 12
    p: float = 0.1

    @property
    def batch(self):
        return self.B

    def draw(self):
        return {"seed": torch.tensor(SEED)}

    keep = CausalAttention.keep

    def reference(self, keep, seed):
        return keep.tril()

    def intermediate(self):
        return self.H * self.T * self.T

    def floors(self, s, programs):
        return {"forward": roofline.dropout_mask(self.B, self.H, self.T)}

    def comparable(self, out):
        return unpack_bits(out, self.T).tril()


def seed(device: torch.device | str) -> Tensor:
    """The dropout seed of all cases."""
    return _seed(torch.device(device).type)


@cache
def _seed(device: str) -> Tensor:
    return torch.tensor(SEED, device=device)


def draw(case: Case, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors, the same at each call; those of `dtype` get gradients."""
    torch.manual_seed(zlib.crc32(str(case).encode()))
    with torch.device(device):
        tensors = case.draw()
    return {
        name: t.to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def results(function, tensors: dict[str, Tensor], dout: Tensor | None) -> dict[str, Tensor]:
    """The output and the gradients, under "out" and the tensors' names."""
    out = function(**tensors)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), dout) if leaves else ()
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def oracle(
    case: Case, tensors: dict[str, Tensor], dout: Tensor | None, dtype: torch.dtype, device
) -> dict[str, Tensor]:
    """`results` of the reference computed in `dtype`, as fp64, a part of the batch at a time."""
    lists: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    for part in _parts(case):
        cut = {
            name: _leaf(t[part] if name in case.batched else t, dtype)
            for name, t in tensors.items()
        }
        keep = case.keep(seed(device), part.start, part.stop - part.start)
        dout_of_part = dout if dout is None or dout.dim() == 0 else dout[part]
        for name, t in results(partial(case.reference, keep), cut, dout_of_part).items():
            if name in case.batched or (name == "out" and t.dim()):
                lists.setdefault(name, []).append(t.double())
            else:
                sums[name] = sums.get(name, 0) + t.double()
    return sums | {name: torch.cat(parts) for name, parts in lists.items()}


def _leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t


def _parts(case: Case) -> Iterator[slice]:
    step = max(1, PART // case.intermediate())
    for first in range(0, case.batch, step):
        yield slice(first, min(first + step, case.batch))


def _named(names: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name in names.split()}


N, TOKENS = 32768, 32768  # rows of GPT-1's batch: 64 sequences of 512

GPT1 = [
    CausalAttention(B=64, T=512),
    CausalAttention(B=64, T=512, p=0.1),
    DropoutMask(B=64, T=512),
    DropoutAddLayerNorm(N=N, p=0.1),
    LayerNorm(N=N),
    GeluFFN(N=N),
    LinearCrossEntropy(N=N),
    Embedding(B=64, T=512, p=0.1),
]
"""GPT-1's own sizes."""

SWEEP = [
    *(
        CausalAttention(B=TOKENS // T, T=T, p=p)
        for T in (64, 128, 256, 1024, 2048)
        for p in (0, 0.1)
    ),
    *(CausalAttention(B=64, T=512, H=768 // D, D=D, p=p) for D in (32, 96, 128) for p in (0, 0.1)),
    *(DropoutMask(B=TOKENS // T, T=T) for T in (64, 2048)),
    *(DropoutAddLayerNorm(N=rows, p=0.1) for rows in (1024, 8192, 131072)),
    *(DropoutAddLayerNorm(N=8192, C=C, p=0.1) for C in (128, 2048)),
    DropoutAddLayerNorm(N=N),
    *(LayerNorm(N=rows) for rows in (1024, 8192, 131072)),
    *(GeluFFN(N=rows) for rows in (512, 4096)),
    *(LinearCrossEntropy(N=8192, V=V) for V in (8192, 50257, 128256)),
    *(Embedding(B=B, T=512, p=0.1) for B in (8, 256)),
]
"""Lengths, head sizes, rows, widths and vocabularies around them."""

SMALL = [
    CausalAttention(B=2, T=128, H=4),
    CausalAttention(B=2, T=128, H=4, p=0.1),
    DropoutMask(B=2, T=128, H=4),
    DropoutAddLayerNorm(N=1024, C=256, p=0.1),
    LayerNorm(N=1024, C=256),
    GeluFFN(N=512, C=256, F=1024),
    LinearCrossEntropy(N=512, C=256, V=4096),
    Embedding(B=4, T=256, C=256, V=4096, p=0.1),
]
"""What a CPU does in milliseconds."""

SMALL_SWEEP = [
    *(CausalAttention(B=1024 // T, T=T, H=2, p=0.1) for T in (64, 512)),
    *(CausalAttention(B=2, T=128, H=256 // D, D=D, p=0.1) for D in (32, 128)),
    DropoutAddLayerNorm(N=8192, C=256, p=0.1),
    LinearCrossEntropy(N=512, C=256, V=1024),
]
