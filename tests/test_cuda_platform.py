"""The checked CPU build of the CUDA kernels notices what a GPU would let pass."""

import pytest
import torch

from gpt1_kernels.backends.cuda import extension

if (absence := extension.absence("cuda_host")) is not None:
    pytest.skip(absence, allow_module_level=True)

from gpt1_kernels import _cuda_host

PATTERNS = torch.arange(2**16, dtype=torch.int32)


@pytest.fixture(params=["forward", "reversed", "shuffled"])
def order(request):
    _cuda_host.set_order(request.param, 3)
    yield request.param
    _cuda_host.set_order("forward")


def counted(name: str, planted: bool) -> dict:
    _cuda_host.count_traffic(True)
    _cuda_host.run_planted(name, planted)
    _cuda_host.count_traffic(False)
    return _cuda_host.traffic()["planted"]


@pytest.mark.parametrize("name", _cuda_host.planted_names())
def test_a_planted_bug_is_a_fault_in_every_order(name, order):
    """That names the kernel, the block, the thread and the line; without the bug all is well."""
    _cuda_host.run_planted(name, False)
    with pytest.raises(
        _cuda_host.KernelFault,
        match=r"^planted, block \d+, thread \d+, host_planted\.cu:\d+: \w+",
    ):
        _cuda_host.run_planted(name, True)
    _cuda_host.run_planted(name, False)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order: 'backward', expected forward, reversed or"):
        _cuda_host.set_order("backward")


def test_shared_memory_starts_as_nan(order):
    assert torch.tensor(_cuda_host.run_planted("unwritten shared memory", True)).isnan().all()
    assert _cuda_host.run_planted("unwritten shared memory", False) == [1.0] * 64


def test_sums_are_nan_until_their_product_is_waited_for(order):
    assert torch.tensor(_cuda_host.run_planted("sums read before the wait", True)).isnan().all()
    assert _cuda_host.run_planted("sums read before the wait", False) == [64.0 / 4] * 64


def test_a_second_read_is_issued_twice_and_compulsory_once(order):
    once, twice = (counted("second read", planted) for planted in (False, True))
    assert (once["compulsory"], once["issued"]) == (512, 512)
    assert (twice["compulsory"], twice["issued"]) == (512, 768)


def test_a_strided_access_counts_whole_sectors(order):
    packed, strided = (counted("strided access", planted) for planted in (False, True))
    assert (packed["compulsory"], packed["issued"]) == (64, 64)
    assert (strided["compulsory"], strided["issued"]) == (32 + 8 * 32, 32 + 8 * 32)


def test_bank_conflicts_are_counted_where_they_happen(order):
    none, eightfold = (counted("bank conflict", planted) for planted in (False, True))
    assert (none["shared_accesses"], none["bank_conflicts"], none["conflicts_at"]) == (2, 0, {})
    assert (eightfold["shared_accesses"], eightfold["bank_conflicts"]) == (2, 2 * 7)
    [(place, extra)] = eightfold["conflicts_at"].items()
    assert place.startswith("host_planted.cu:")
    assert extra == 2 * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_widens_as_in_torch_and_comes_back(dtype):
    expected = PATTERNS.to(torch.int16).view(dtype).float()
    widened = torch.tensor(_cuda_host.widened(dtype, PATTERNS.tolist()))
    nan = expected.isnan()
    assert torch.equal(widened.isnan(), nan)
    assert torch.equal(widened[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    narrowed = torch.tensor(_cuda_host.narrowed(dtype, widened.tolist()))
    assert torch.equal(narrowed[~nan], PATTERNS[~nan])
    assert _is_nan(narrowed[nan], dtype).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_round_to_the_nearest_and_ties_to_even(dtype):
    """Halfway between any two neighbours, and one float to either side of it."""
    values = PATTERNS.to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].unique()
    overflow = 2 * finite[-1].double() - finite[-2].double()  # would be next, and is infinite
    finite = torch.cat([-overflow[None], finite.double(), overflow[None]])
    halfway = (finite[1:] + finite[:-1]).div(2).float()
    around = torch.cat([halfway, *(halfway.nextafter(torch.tensor(s)) for s in (-1e38, 1e38))])
    expected = around.to(dtype).view(torch.int16).int() & 0xFFFF
    actual = torch.tensor(_cuda_host.narrowed(dtype, around.tolist()))
    assert torch.equal(actual, expected)


def _is_nan(patterns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return patterns.to(torch.int16).view(dtype).isnan()


NUMBERS = torch.arange(60).reshape(3, 4, 5)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(NUMBERS, id="contiguous"),
        pytest.param(NUMBERS[1], id="from the middle"),
        pytest.param(NUMBERS.transpose(0, 2), id="transposed"),
        pytest.param(NUMBERS[:, 1:3, ::2], id="with gaps"),
        pytest.param(NUMBERS[:1].expand(7, 4, 5), id="one row for many"),
        pytest.param(NUMBERS[2, 3, 4], id="0-d"),
    ],
)
def test_a_launcher_takes_a_tensor_from_its_first_element_to_its_last(tensor):
    address, extent = _cuda_host.array(tensor)
    first, last = int(tensor.min()), int(tensor.max())  # each element is its own offset
    assert address == NUMBERS.data_ptr() + first * NUMBERS.element_size()
    assert extent == last - first + 1


@pytest.mark.parametrize("tensor", [None, NUMBERS[:0], NUMBERS[:, :, 5:]])
def test_a_launcher_takes_nothing_of_a_tensor_without_elements(tensor):
    assert _cuda_host.array(tensor) == (0, 0)


@pytest.mark.parametrize("no_tensor", [7, "x", [NUMBERS]])
def test_a_launcher_takes_tensors_alone(no_tensor):
    with pytest.raises(AttributeError, match="numel"):
        _cuda_host.array(no_tensor)


def test_a_launcher_names_the_dtypes_that_it_takes():
    with pytest.raises(TypeError, match=r"torch\.float64, expected float32, bfloat16 or float16"):
        _cuda_host.widened(torch.float64, [])
