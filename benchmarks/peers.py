"""Who is timed: our backends, PyTorch in several ways, and libraries where they are installed.

An implementation is a function of a case and its tensors, the same for all of an op. A yardstick is
timed beside them but computes something else, such as an op's matrix products and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, seed
from gpt1_kernels import ops, use_backend
from gpt1_kernels.backends import unavailable_reason

BACKENDS = ("triton", "cuda", "portable")  # `cuda_host` and Triton's interpreter are for tests
EPS = 1e-5


@dataclass(frozen=True)
class Implementation:
    name: str
    run: Callable[..., Tensor]
    """(case, **tensors) → the op's output."""
    backend: str | None = None
    """Of ours, which draw the reference's dropout bits; peers draw their own."""
    on_cpu: bool = False
    package: str | None = None
    """The distribution that it needs beside torch."""

    @property
    def ours(self) -> bool:
        return self.backend is not None

    def absence(self, op: str, device: str) -> str | None:
        """Why it cannot be timed on a device type, or None."""
        if device == "cpu" and not self.on_cpu:
            return "needs a GPU"
        if device == "cuda" and self.backend == "portable":
            return "is for machines without a GPU"
        if self.package is not None and not _is_installed(self.package):
            return f"{self.package} is not installed"
        return unavailable_reason(self.backend, op, device) if self.ours else None


def implementations(case: Case) -> list[Implementation]:
    """All that are known for a case, ours first."""
    ours = [_on(backend, OURS[case.op], backend) for backend in BACKENDS]
    if case.op == "causal_attention" and case.p:
        ours += [
            _on(backend, partial(_attention_of_bits, backend), f"{backend} given bits")
            for backend in BACKENDS
        ]
    return ours + PEERS[case.op]


def _on(backend: str, function: Callable[..., Tensor], name: str) -> Implementation:
    def run(case, **tensors):
        with use_backend(backend):
            return function(case, **tensors)

    return Implementation(name, run, backend, on_cpu=backend == "portable")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# Ours.


def _dropout(case: Case, device: torch.device) -> dict:
    return {"dropout_p": case.p, "seed": seed(device) if case.p else None}


def _attention(case, qkv):
    return ops.causal_attention_qkvpacked(qkv, case.H, **_dropout(case, qkv.device))


def _attention_of_bits(backend, case, qkv):
    bits = _bits(backend, case, qkv.device)
    return ops.causal_attention_qkvpacked(qkv, case.H, dropout_p=case.p, keep_bits=bits)


@lru_cache(maxsize=len(BACKENDS))
def _bits(backend: str, case: Case, device: torch.device) -> Tensor:
    return _mask(case, seed(device))


def _mask(case, seed):
    return ops.dropout_mask(seed, (case.B, case.H, case.T, case.T), case.p, causal=True)


OURS: dict[str, Callable[..., Tensor]] = {
    "causal_attention": _attention,
    "dropout_mask": _mask,
    "layer_norm": lambda case, x, w, b: ops.layer_norm(x, w, b, EPS),
    "dropout_add_layer_norm": lambda case, x, residual, x_bias, w, b: ops.dropout_add_layer_norm(
        x, residual, w, b, EPS, x_bias=x_bias, **_dropout(case, x.device)
    ),
    "gelu_ffn": lambda case, **tensors: ops.gelu_ffn(**tensors),
    "embedding": lambda case, ids, w_token, w_position: ops.embedding(
        ids, w_token, w_position, **_dropout(case, ids.device)
    ),
    "linear_cross_entropy": lambda case, h, w, targets: ops.linear_cross_entropy(h, w, targets),
}


# PyTorch.


def eager_attention(case, qkv):
    q, k, v = _heads(case, qkv)
    hidden = torch.ones(case.T, case.T, dtype=torch.bool, device=qkv.device).triu(1)
    scores = (q @ k.mT * case.D**-0.5).masked_fill(hidden, -torch.inf)
    return _together(F.dropout(scores.softmax(-1), case.p) @ v)


def sdpa(backend: SDPBackend, case, qkv):
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*_heads(case, qkv), dropout_p=case.p, is_causal=True)
    return _together(out)


def _heads(case, qkv):
    """q, k, v, (B, H, T, D) each."""
    return [x.unflatten(-1, (case.H, -1)).transpose(1, 2) for x in qkv.chunk(3, -1)]


def _together(out: Tensor) -> Tensor:  # (B, H, T, D) → (B, T, C)
    return out.transpose(1, 2).flatten(2)


def eager_layer_norm(case, x, w, b):
    return F.layer_norm(x, w.shape, w, b, EPS)


def eager_dropout_add_layer_norm(case, x, residual, x_bias, w, b):
    return F.layer_norm(residual + F.dropout(x + x_bias, case.p), w.shape, w, b, EPS)


def eager_gelu_ffn(case, x, w_fc, b_fc, w_proj, b_proj):
    return torch.addmm(b_proj, F.gelu(torch.addmm(b_fc, x, w_fc), approximate="tanh"), w_proj)


def eager_embedding(case, ids, w_token, w_position):
    return F.dropout(F.embedding(ids, w_token) + w_position, case.p)


def eager_linear_cross_entropy(case, h, w, targets):
    return F.cross_entropy(h @ w.t(), targets)


def _chunked_linear_cross_entropy(case, h, w, targets):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(h, w, targets, options=options)


def _pytorch(function: Callable[..., Tensor]) -> list[Implementation]:
    def compiled(case, **tensors):
        return _compiled(function)(case, **tensors)

    return [
        Implementation("eager", function, on_cpu=True),
        Implementation("torch.compile", compiled, on_cpu=True),
    ]


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# Libraries.


def _flash_attention_2(case, qkv):
    from flash_attn import flash_attn_qkvpacked_func

    packed = qkv.unflatten(-1, (3, case.H, case.D))
    return flash_attn_qkvpacked_func(packed, dropout_p=case.p, causal=True).flatten(2)


def _flash_attention_4(case, qkv):
    from flash_attn.cute import flash_attn_func

    if case.p:
        raise ValueError("it has no dropout")
    q, k, v = qkv.unflatten(-1, (3, case.H, case.D)).unbind(2)
    return flash_attn_func(q, k, v, causal=True)[0].flatten(2)


def _flash_dropout_add_layer_norm(case, x, residual, x_bias, w, b):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x + x_bias, w, b, residual=residual, eps=EPS, dropout_p=case.p)


def _liger_layer_norm(case, x, w, b):
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, w, b, EPS)


def _liger_dropout_add_layer_norm(case, x, residual, x_bias, w, b):
    return _liger_layer_norm(case, residual + F.dropout(x + x_bias, case.p), w, b)


def _liger_linear_cross_entropy(case, h, w, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(h, w, targets)


def _quack_layer_norm(case, x, w, b):
    return _QuackLayerNorm.apply(x, w.float(), b.float())


class _QuackLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        from quack.rmsnorm import layernorm_fwd

        y, rstd, mean = layernorm_fwd(x, w, b, EPS, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, w, rstd, mean)
        return y

    @staticmethod
    def backward(ctx, dy):
        from quack.rmsnorm import layernorm_bwd

        x, w, rstd, mean = ctx.saved_tensors
        return layernorm_bwd(x, w, dy, rstd, mean)


def _quack_linear_cross_entropy(case, h, w, targets):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, targets)


def _cut_cross_entropy(case, h, w, targets):
    from cut_cross_entropy import linear_cross_entropy

    # All of the gradient: its filter leaves out what is small, which of random logits is a lot.
    return linear_cross_entropy(h, w, targets, filter_eps=None)


PEERS: dict[str, list[Implementation]] = {
    "causal_attention": [
        *_pytorch(eager_attention),
        Implementation("SDPA flash", partial(sdpa, SDPBackend.FLASH_ATTENTION), on_cpu=True),
        Implementation("SDPA efficient", partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
        Implementation("SDPA cuDNN", partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
        Implementation("FlashAttention-2", _flash_attention_2, package="flash-attn"),
        Implementation("FlashAttention-4", _flash_attention_4, package="flash-attn-4"),
    ],
    "dropout_mask": [],
    "layer_norm": [
        *_pytorch(eager_layer_norm),
        Implementation("Liger", _liger_layer_norm, package="liger-kernel"),
        Implementation("QuACK", _quack_layer_norm, package="quack-kernels"),
    ],
    "dropout_add_layer_norm": [
        *_pytorch(eager_dropout_add_layer_norm),
        Implementation("Liger", _liger_dropout_add_layer_norm, package="liger-kernel"),
        Implementation("flash-attn", _flash_dropout_add_layer_norm, package="flash-attn"),
    ],
    "gelu_ffn": _pytorch(eager_gelu_ffn),
    "embedding": _pytorch(eager_embedding),
    "linear_cross_entropy": [
        *_pytorch(eager_linear_cross_entropy),
        Implementation("torch chunked", _chunked_linear_cross_entropy, on_cpu=True),
        Implementation("Liger", _liger_linear_cross_entropy, package="liger-kernel"),
        Implementation("QuACK", _quack_linear_cross_entropy, package="quack-kernels"),
        Implementation("cut-cross-entropy", _cut_cross_entropy, package="cut-cross-entropy"),
    ],
}


# Yardsticks: (case, **tensors) → a function of no arguments for each direction.


def _ffn_products(case, x, w_fc, w_proj, **biases):
    hidden, dy = x @ w_fc, torch.randn_like(x)

    def forward():
        x @ w_fc
        hidden @ w_proj

    def backward():
        dy @ w_proj.t()
        hidden.t() @ dy
        hidden @ w_fc.t()
        x.t() @ hidden

    return {"forward": forward, "backward": backward, "both": lambda: (forward(), backward())}


def _loss_products(case, h, w, targets):
    w = F.pad(w, (0, 0, 0, -len(w) % 64))  # rows of logits that are no whole 16 bytes are slow
    logits = h @ w.t()
    return {
        "forward": lambda: h @ w.t(),
        "both": lambda: (h @ w.t(), logits @ w, logits.t() @ h),
    }


def _bernoulli(case, seed):
    shape = (case.B, case.H, case.T, case.T)
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    return {"forward": lambda: keep.bernoulli_(1 - case.p)}


YARDSTICKS: dict[str, tuple[str, Callable[..., dict[str, Callable]]]] = {
    "gelu_ffn": ("bare products", _ffn_products),
    "linear_cross_entropy": ("bare products", _loss_products),
    "dropout_mask": ("bernoulli in bytes", _bernoulli),
}
