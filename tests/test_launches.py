"""`benchmarks.launches` sees each kernel of an update, ours and PyTorch's, and a layer has few."""

import pytest

from benchmarks.launches import launches_of_update
from tests.cases import backends_of

OURS = {"triton": 17, "cuda_host": 17}
PYTORCHS = {
    "aten::addmm": 1,  # c_attn
    "aten::mm": 5,  # its two gradients, and c_proj
    "aten::sum": 1,  # the gradient of c_attn's bias
    "aten::add": 2,  # of the gradients that meet where a residual branch leaves
}


@pytest.mark.parametrize("backend", [b for b in OURS if b in backends_of("layer_norm")])
def test_launches_of_a_layer(backend):
    one, two = (launches_of_update(backend, n_layer) for n_layer in (1, 2))
    layer = two - one
    pytorchs = {name: count for name, count in layer.items() if name.startswith("aten")}
    assert pytorchs == PYTORCHS
    assert layer.total() - sum(pytorchs.values()) == OURS[backend]
    assert (one - layer).total() == 58
