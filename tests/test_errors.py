"""The record of ids out of range that a GPU keeps; its arithmetic runs on any device."""

import pytest
import torch

from gpt1_kernels import check_errors, errors, ops
from gpt1_kernels.backends import kernel
from tests.cases import DEVICE


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(errors, "_records", {})
    return errors.error_record("embedding", 10, torch.device(DEVICE))


def note(record, *ids):
    ids = torch.tensor(ids, device=DEVICE)
    record.note(ids, (ids >= 0) & (ids < 10))


def test_the_first_id_out_of_range_is_raised_once(record):
    note(record)
    note(record, 3, 4)
    check_errors()
    note(record, 3, 12, 13)
    note(record, -1)
    note(record, 1)
    with pytest.raises(
        IndexError, match=rf"embedding: id 12 is out of range \[0, 10\) on {DEVICE}"
    ):
        check_errors()
    check_errors()
    note(record, -1)
    with pytest.raises(IndexError, match="id -1 "):
        check_errors()


def test_threads_that_meet_share_a_record(monkeypatch, record):
    key, created = ("embedding", 11, torch.device(DEVICE)), []
    init = errors.ErrorRecord.__init__

    def meet(self, device):
        init(self, device)
        if not created:  # another thread comes and goes while this one makes its record
            created.append(self)
            created.append(errors.error_record(*key))

    monkeypatch.setattr(errors.ErrorRecord, "__init__", meet)
    assert errors.error_record(*key) is created[1]


def test_what_a_kernel_recorded_is_not_overwritten(record):
    """`note` used to copy a twin of the record over what a Triton kernel had written to it."""
    record.host.copy_(torch.tensor([1, 12]))
    note(record, 3)
    note(record, -1)
    with pytest.raises(IndexError, match="id 12 "):
        check_errors()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU raises at once")
def test_backends_share_a_record(record):
    tables = torch.randn(2, 10, 16, device=DEVICE)
    for backend, value in (("triton", 12), ("portable", -1)):
        ids = torch.tensor([[0, value]], device=DEVICE)
        forward = kernel(backend, "embedding", "embedding_fwd")
        forward(ids, *tables, None, None, None, 0.0, 0, torch.float32)
    with pytest.raises(IndexError, match="id 12 "):
        check_errors()


def test_the_next_op_raises_it(record):
    note(record, 99)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    x = torch.randn(3, 16, device=DEVICE)
    with pytest.raises(IndexError, match="embedding: id 99 "):
        ops.layer_norm(x, x[0], x[0])
    ops.layer_norm(x, x[0], x[0])


def test_one_record_an_op_and_bound(record):
    assert errors.error_record("embedding", 10, torch.device(DEVICE)) is record
    assert errors.error_record("embedding", 11, torch.device(DEVICE)) is not record


def test_a_record_made_in_inference_mode_is_written_to_in_any(monkeypatch):
    monkeypatch.setattr(errors, "_records", {})
    with torch.inference_mode():
        record = errors.error_record("embedding", 10, torch.device(DEVICE))
    note(record, 12)
    with pytest.raises(IndexError, match="id 12 "):
        check_errors()


def test_what_another_thread_takes_meanwhile_is_not_raised_twice(record, monkeypatch):
    note(record, 12)
    check = record.take
    monkeypatch.setattr(record, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    taken = []

    def wait(device):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        taken.append(check())

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert check() is None
    assert taken == [12]


def test_an_id_recorded_before_a_capture_is_raised_in_it(record, monkeypatch):
    """The host waited for the GPU, which broke the capture with an error that names no id."""
    note(record, 12)
    monkeypatch.setattr(record, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waits in a capture"))
    with pytest.raises(IndexError, match="id 12 "):
        errors.raise_recorded()
