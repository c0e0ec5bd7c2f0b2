"""Triton's kernels touch no memory but that of their arguments.

The interpreter reads and writes what lies beside it without a word, and results seldom show it:
what was read is masked later, what was written is written over by the next program.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from gpt1_kernels import use_backend
from tests.cases import (
    DEVICE,
    SEED,
    P,
    backends_of,
    cast,
    causal_attention,
    causal_attention_qkvpacked,
    dropout_add_layer_norm,
    embedding,
    forked,
    gelu_ffn,
    linear_cross_entropy,
    results,
    upstream,
)

if "triton" not in backends_of("layer_norm") or DEVICE == "cuda":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt1_kernels import ops
from gpt1_kernels.backends.triton.matmul import matmul


@pytest.fixture
def checked(monkeypatch):
    """Every address that a launch accesses lies in the memory of one of its tensors."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run, memory = GridExecutor.__call__, []

    def launch(self, *args, **kwargs):
        tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in tree_leaves(args)]
        storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        memory[:] = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        run(self, *args, **kwargs)

    def check(pointers, mask, what):
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        starts, ends = np.array(memory).T
        owner = np.searchsorted(starts, used, side="right") - 1
        beside = used[(owner < 0) | (used >= np.maximum.accumulate(ends)[owner])]
        assert not beside.size, f"{what} of {beside.size} elements beside all tensors"

    def checked_load(self, pointers, mask, *rest, **hints):
        check(pointers, mask, "a load")
        return load(self, pointers, mask, *rest, **hints)

    def checked_store(self, pointers, value, mask, *rest, **hints):
        check(pointers, mask, "a store")
        return store(self, pointers, value, mask, *rest, **hints)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


@triton.jit
def copy_kernel(x_ptr, y_ptr, loaded, stored):
    offset = tl.arange(0, 16)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=offset < loaded), mask=offset < stored)


@pytest.mark.parametrize(("loaded", "stored", "what"), [(10, 9, "load"), (9, 10, "store")])
def test_one_element_too_many_is_noticed(loaded, stored, what, checked):
    x, y = torch.ones(2, 9)
    x, y = x.clone(), y.clone()
    copy_kernel[(1,)](x, y, 9, 9)
    with pytest.raises(Exception, match=f"a {what} of 1 elements beside all tensors"):
        copy_kernel[(1,)](x, y, loaded, stored)


CASES = [
    dropout_add_layer_norm("tails", 37, 80, P),
    forked(dropout_add_layer_norm("tails", 5, 81, 0.0)),
    causal_attention("tails", 2, 40, 70, 2, 80, P),
    causal_attention("padding", 3, 40, 70, 1, 16, P, padding=[0, 37, 99]),
    causal_attention_qkvpacked("tails", 1, 129, 2, 16, P),
    gelu_ffn("tails", 131, 45, 201),
    gelu_ffn("more-rows-than-a-chunk-of-their-sum", 300, 24, 40),
    embedding("tails", 3, 17, 50, 48, P, types=True, offset=4),
    embedding("positions-by-order", 3, 17, 50, 80, P),
    embedding("a-run-that-its-second-step-ends", 65, 64, 8, 48, ids=7),
    linear_cross_entropy("tails", 37, 48, 1001, "none", ignored=3, weighted=True),
    linear_cross_entropy("mean", 37, 48, 1001),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_access_lies_beside_the_tensors(case, checked):
    with use_backend("triton"):
        results(case.fused, case.inputs, upstream(case, torch.float32))


def test_none_lies_beside_a_table_whose_last_row_is_read(checked):
    table = torch.randn(17, 80)
    with use_backend("triton"):
        call = partial(ops.embedding, torch.zeros(2, 17, dtype=torch.long))
        results(call, {"w_token": table, "w_position": table})


def test_none_lies_beside_a_sum_that_a_product_is_added_to(checked):
    out = torch.zeros(37, 45)
    matmul(torch.ones(37, 20), torch.ones(20, 45), out, accumulate=True)
    assert (out == 20).all()


def test_no_access_in_bf16_whose_tiles_of_keys_are_two_words_of_bits_wide(checked):
    case = causal_attention("three-words-of-bits", 1, 40, 70, 1, 16, P)
    inputs = cast(case, torch.bfloat16, torch.bfloat16)
    with use_backend("triton"):
        results(case.fused, inputs, upstream(case, torch.bfloat16))


@pytest.mark.parametrize(("shape", "causal"), [((2, 3, 130, 70), False), ((2, 2, 70, 133), True)])
def test_no_word_of_dropout_bits_lies_beside_them(shape, causal, checked):
    with use_backend("triton"):
        ops.dropout_mask(SEED, shape, P, causal=causal)
