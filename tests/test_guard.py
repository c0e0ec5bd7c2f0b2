"""The regression guard: what it compares, what it says, and that it sees a planted second read."""

import json
import re
from importlib import util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("launches and bytes are counted on Triton's interpreter", allow_module_level=True)

from benchmarks import baseline, guard, traffic
from benchmarks.baseline import BaselineError
from gpt1_kernels.backends.triton import attention

PART = {
    "versions": {"a compiler": "1.0"},
    "rows": {
        "layer_norm": {"registers": 40, "wide share": 0.9},
        "matmul": {"registers": 128},
        "gelu_ffn": {"empty ops": 4.0},
    },
}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A baseline with PART as its parts "triton" and "host"."""
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"triton": PART, "host": PART}))
    monkeypatch.setattr(baseline, "FILE", path)
    return path


def message(part: str, rows: dict, whole: bool = False) -> str:
    with pytest.raises(BaselineError) as error:
        baseline.check(part, rows, whole)
    return str(error.value)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ({"matmul": {"registers": 129}}, "worse  matmul: registers was 128, is 129 (+0.8%)"),
        ({"matmul": {"registers": 96}}, "better matmul: registers was 128, is 96 (-25.0%)"),
        (
            {"layer_norm": {"registers": 40, "wide share": 0.8}},
            "worse  layer_norm: wide share was 0.9, is 0.8 (-11.1%)",
        ),
        (
            {"layer_norm": {"registers": 32, "wide share": 0.8}},
            "worse  layer_norm: registers was 40, is 32 (-20.0%); "
            "wide share was 0.9, is 0.8 (-11.1%)",
        ),
        ({"sum": {"registers": 1234}}, "new    sum: registers is 1,234"),
        ({"gelu_ffn": {}}, "gone   gelu_ffn: empty ops was 4.0"),
    ],
)
@pytest.mark.usefixtures("file")
def test_what_differs_is_named_with_what_it_was_and_is(rows, line):
    text = message("triton", rows)
    assert line in text.splitlines()[1].strip()
    assert "python -m benchmarks.guard --update --parts triton" in text


@pytest.mark.usefixtures("file")
def test_rows_that_are_missing_matter_to_a_whole_part_alone():
    equal = {"matmul": {"registers": 128}}
    baseline.check("triton", equal)
    assert "gone   layer_norm: registers was 40; wide share was 0.9" in message(
        "triton", equal, whole=True
    )


@pytest.mark.usefixtures("file")
def test_what_is_worse_comes_first():
    rows = {"gelu_ffn": {"empty ops": 3}, "sum": {"registers": 1}, "matmul": {"registers": 200}}
    verdicts = re.findall(r"^  (worse|new|better)", message("triton", rows), re.M)
    assert verdicts == ["worse", "new", "better"]


@pytest.mark.parametrize("ops", [2.7, 4.0, 5.9])
@pytest.mark.usefixtures("file")
def test_times_may_differ_by_noise(ops):
    baseline.check("host", {"gelu_ffn": {"empty ops": ops}})


@pytest.mark.parametrize(("ops", "verdict"), [(6.1, "worse"), (2.6, "better")])
@pytest.mark.usefixtures("file")
def test_times_may_not_differ_by_more(ops, verdict):
    assert verdict in message("host", {"gelu_ffn": {"empty ops": ops}})


@pytest.mark.usefixtures("file")
def test_other_versions_are_not_compared():
    assert baseline.mismatch("triton", {"a compiler": "1.0"}) is None
    assert baseline.mismatch("triton", {"a compiler": "1.1"}) == (
        "the baseline was made by a compiler 1.0, this by a compiler 1.1"
    )


def measuring(monkeypatch, part: str, rows: dict, absence=None) -> None:
    made = guard.Part(lambda: iter([rows]), lambda: {"a compiler": "1.0"}, lambda: absence)
    monkeypatch.setitem(guard.PARTS, part, made)


def test_an_update_writes_what_differs_and_keeps_what_is_noise(file, monkeypatch, capsys):
    measuring(monkeypatch, "host", {"gelu_ffn": {"empty ops": 4.4}, "matmul": {"registers": 300}})
    config = guard.GuardConfig(parts=("host",))
    assert not guard.main(config)
    assert "worse  matmul" in capsys.readouterr().out
    assert guard.main(guard.GuardConfig(parts=("host",), update=True))
    parts = json.loads(file.read_text())
    assert parts["triton"] == PART
    assert parts["host"]["rows"] == {"gelu_ffn": {"empty ops": 4.0}, "matmul": {"registers": 300}}
    assert guard.main(config)


def test_an_update_of_what_cannot_be_measured_leaves_it_and_fails(file, monkeypatch, capsys):
    before = file.read_text()
    measuring(monkeypatch, "host", {}, absence="it was not built")
    assert guard.main(guard.GuardConfig(parts=("host",)))
    assert not guard.main(guard.GuardConfig(parts=("host",), update=True))
    assert file.read_text() == before
    assert "host: not measured: it was not built" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["bytes", "launches", "host"])
@pytest.mark.usefixtures("file")
def test_kernels_of_older_sources_are_not_compared(monkeypatch, capsys, part):
    monkeypatch.setattr(guard, "is_outdated", lambda name: name == "_cuda_host")
    assert not guard.main(guard.GuardConfig(parts=(part,), update=True))
    assert "not measured: backend cuda_host: its sources were changed" in capsys.readouterr().out


def test_the_file_has_a_row_a_line():
    assert baseline.FILE.read_text() == baseline._lines(baseline.read())
    rows = sum(len(part["rows"]) for part in baseline.read().values())
    assert rows < len(baseline.FILE.read_text().splitlines()) < rows + 50


def test_every_call_has_its_bytes_in_the_baseline():
    names = {f"{name} on {b}" for name, call in traffic.CALLS.items() for b in call.counted_at}
    assert baseline.read()["bytes"]["rows"].keys() == names


def compared(part: str) -> baseline.Rows:
    """The rows of a part; the test is skipped where they cannot be compared."""
    measured = guard.PARTS[part]
    if reason := measured.absence() or baseline.mismatch(part, measured.versions()):
        pytest.skip(reason)
    rows = {}
    for some in measured.rows():
        rows |= some
    return rows


@pytest.mark.parametrize("part", ["launches", "host"])
def test_the_part_is_the_baselines(part):
    baseline.check(part, compared(part), whole=True)


READ = "v = _load_tile(v_ptr, start_n, v_strides[1], key_mask, BLOCK_N, D, BLOCK_D)"


def test_a_second_read_planted_in_a_kernel_fails(monkeypatch, tmp_path):
    """Attention's forward reads each tile of values twice, which changes no result."""
    source = Path(attention.__file__).read_text()
    assert READ in source
    path = tmp_path / "planted.py"
    path.write_text(source.replace(READ, f"{READ}; {READ}", 1))
    spec = util.spec_from_file_location("planted", path)
    planted = util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(
        attention, "causal_attention_fwd_kernel", planted.causal_attention_fwd_kernel
    )
    monkeypatch.setattr(traffic, "count", traffic.count.__wrapped__)  # without what it remembers

    name = "causal_attention_qkvpacked_fwd"
    was = baseline.read()["bytes"]["rows"][f"{name} on triton"]["issued"]
    values = traffic.BATCH * traffic.H * traffic.T * traffic.D * traffic.S
    tiles = (
        traffic.T
        // attention.attention_fwd_tiles(traffic.D, traffic.S, torch.device("cpu")).BLOCK_M
    )
    again = values * (tiles + 1) // 2  # the last tile of queries sees all keys, the others fewer
    assert message("bytes", traffic.row(name, "triton")).splitlines()[1:2] == [
        f"  worse  {name} on triton: issued was {was:,}, is {was + again:,} ({again / was:+.1%})"
    ]
