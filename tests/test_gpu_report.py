"""`benchmarks/gpu_report.py`: its parts on a CPU, what it does when one fails, and its targets."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the report itself runs here", allow_module_level=True)

from benchmarks import compare_models, gpu_report, record, report_page, report_parts
from benchmarks.apart import Outcome, run_apart
from benchmarks.report_page import markdown, write_page
from benchmarks.report_parts import PARTS, ROOT, TINY
from benchmarks.targets import TARGETS, Measured
from benchmarks.train_step import Side
from gpt1_kernels.backends.cuda import extension

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of SDPA, saying why it raises


def report(folder, *arguments: str) -> tuple[int, dict]:
    status = gpu_report.main(["--device", "cpu", "--out", str(folder), *arguments])
    return status, record.read(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the report of a CPU, and its record."""
    folder = tmp_path_factory.mktemp("record")
    status, found = report(folder)
    assert status == 0, record.failures(found)
    return folder, found


@pytest.fixture
def without_pictures(monkeypatch):
    """They take a second each; `whole` has them."""
    for name in ("draw_roofline", "draw_peers"):
        monkeypatch.setattr(report_page, name, lambda *_: None)


def test_every_part_finds_something(whole):
    _, found = whole
    assert found["device"] == "cpu"
    version = found["machine"]["packages"]["torch"]  # PyPI's lacks the +cu130 of torch.__version__
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["parts"].keys() == PARTS.keys() - {"machine"}
    for name, part in found["parts"].items():
        assert part["found"], name
        assert part["commit"]


def test_every_case_is_measured_in_every_direction(whole):
    _, found = whole
    rows = [row for part in found["parts"].values() for row in part["found"] if "direction" in row]
    measured = {(row["case"], row["direction"]) for row in rows if row["kind"] == "ours"}
    assert measured == {(str(case), d) for case in TINY.cases for d in case.directions}
    assert all(len(row["seconds"]) == TINY.rounds for row in rows)
    ((parity,),) = [found["parts"]["parity"]["found"]]
    assert parity["PASSED"] > 5
    kernels = [row for row in found["parts"]["profile"]["found"] if "calls" in row]
    (site,) = [k for k in kernels if k["name"] == "gpt1_kernels::dropout_add_layer_norm_fwd"]
    assert site["calls"] == 2 * TINY.size.overrides["n_layer"]
    hosts = {row["backend"] for row in found["parts"]["host"]["found"] if "op" in row}
    assert hosts == ({"cuda_host"} if extension.absence("cuda_host") is None else set())


def test_the_page_says_that_it_is_of_a_cpu_and_has_the_tables(whole):
    folder, _ = whole
    page = (folder / "README.md").read_text()
    assert page.startswith("# A CPU")
    assert "## Targets" not in page
    assert "## What failed" not in page
    for case in TINY.cases:
        assert f"\n{case}, forward\n" in page
    assert "| gpt1_kernels, portable |" in page
    assert "an update by gpt1_kernels, portable takes" in page
    assert "| attention | triton, cuda" in page
    for picture in ("roofline.png", "peers.png"):
        assert f"]({picture})" in page
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("without_pictures")
def test_a_part_that_is_run_again_replaces_its_own(whole):
    folder, before = whole
    status, found = report(folder, "--only", "layer_norm", "--commit", "another")
    assert status == 0
    changed = {name for name, part in found["parts"].items() if part != before["parts"][name]}
    assert changed == {"layer_norm"}
    assert found["parts"]["layer_norm"]["commit"] == "another"
    assert "another" in (folder / "README.md").read_text()


def stub(monkeypatch, **parts) -> None:
    for name, run in parts.items():
        monkeypatch.setitem(PARTS, name, report_parts.Part(run, 10))


@pytest.mark.usefixtures("without_pictures")
def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    def failing(plan, emit):
        emit({"bandwidth": 1e9, "rate": 1e9})
        raise RuntimeError("no ceiling")

    stub(monkeypatch, ceilings=failing)
    status, found = report(tmp_path, "--only", "ceilings", "layer_norm")
    assert status == 1
    assert "RuntimeError: no ceiling" in found["parts"]["ceilings"]["problem"]
    assert found["parts"]["ceilings"]["found"] == [{"bandwidth": 1e9, "rate": 1e9}]
    assert found["parts"]["layer_norm"]["problem"] is None
    page = (tmp_path / "README.md").read_text()
    assert "## What failed" in page
    assert "RuntimeError: no ceiling" in page
    assert "layer_norm N=32 C=64, backward" in page
    assert "ceilings: Traceback" in capsys.readouterr().err


def test_wrong_results_of_ours_and_tests_that_did_not_end_are_failures():
    parts = {
        "layer_norm": {"problem": None, "found": [{"left_out": {}, "wrong": ["triton"]}]},
        "parity": {"problem": None, "found": [{"tests": "cuda", "wrong": [], "complete": False}]},
        "gelu_ffn": {"problem": None, "found": [{"left_out": {"Liger": "no"}, "wrong": []}]},
    }
    assert record.failures({"parts": parts}) == [
        ("layer_norm", "triton"), ("parity", "cuda: not all tests were through in time")
    ]  # fmt: skip


def test_no_part_starts_after_the_last_minute(tmp_path, monkeypatch):
    ran = []
    stub(monkeypatch, ceilings=lambda plan, emit: (time.sleep(0.2), ran.append("ceilings")))
    stub(monkeypatch, layer_norm=lambda plan, emit: ran.append("layer_norm"))
    arguments = ["--minutes", "0.001", "--only", "ceilings", "layer_norm"]
    status, found = report(tmp_path, *arguments)
    assert status == 1
    assert "layer_norm" not in ran
    assert found["parts"]["layer_norm"]["problem"] == "nothing was left of 0.001 minutes"


def test_a_part_that_is_not_run_keeps_what_it_found_before(tmp_path, monkeypatch, capsys):
    stub(monkeypatch, layer_norm=lambda plan, emit: emit({"found": 1}))
    _, before = report(tmp_path, "--only", "layer_norm")
    stub(monkeypatch, ceilings=lambda plan, emit: time.sleep(0.2))
    status, found = report(tmp_path, "--minutes", "0.001", "--only", "ceilings", "layer_norm")
    assert found["parts"]["layer_norm"] == before["parts"]["layer_norm"]
    assert status == 1
    assert (
        "layer_norm: nothing was left of 0.001 minutes, so its earlier results stay"
        in capsys.readouterr().err
    )


def test_a_part_that_found_nothing_has_no_results_to_keep(tmp_path, monkeypatch, capsys):
    stub(monkeypatch, ceilings=lambda plan, emit: time.sleep(0.2))
    for minutes in ("0.001", "0.002"):
        _, found = report(tmp_path, "--minutes", minutes, "--only", "ceilings", "layer_norm")
        problem = f"nothing was left of {minutes} minutes"
        assert found["parts"]["layer_norm"]["problem"] == problem
        assert "earlier results stay" not in capsys.readouterr().err


def test_a_part_that_runs_out_of_time_replaces_none_that_did_not(tmp_path, monkeypatch, capsys):
    late = Outcome([{"found": 2}], "it took longer than 3 s", 3.0, timed_out=True)
    whole = Outcome([{"found": 1}], None, 1.0)
    for outcome, kept in ((late, late), (whole, whole), (late, whole)):
        monkeypatch.setattr(gpu_report, "run_together", lambda *_, o=outcome: {"layer_norm": o})
        code, found = report(tmp_path, "--only", "layer_norm")
        assert found["parts"]["layer_norm"]["found"] == kept.found
        assert code == outcome.timed_out
    assert (
        "layer_norm: it took longer than 3 s, so its earlier results stay"
        in capsys.readouterr().err
    )


def test_parts_that_time_nothing_run_beside_each_other_alone(tmp_path, monkeypatch):
    running, seen = set(), {}

    def part(name):
        def run(plan, emit):
            running.add(name)
            time.sleep(0.3)
            seen[name] = set(running)
            running.discard(name)

        return run

    untimed = [name for name in PARTS if not PARTS[name].timing]
    assert len(untimed) > 1
    names = ["build", *untimed, "ceilings"]
    for name in names:
        monkeypatch.setitem(PARTS, name, replace(PARTS[name], run=part(name)))
    report(tmp_path, "--only", *names)
    assert seen["build"] == {"build"}
    assert seen["ceilings"] == {"ceilings"}
    assert any(len(seen[name]) > 1 for name in untimed)


def test_a_rehearsal_goes_through_parts_once(monkeypatch):
    """With what compiles for long, and without the eager model, which takes all memory."""
    plans, found = [], []
    stub(monkeypatch, step=lambda plan, emit: (plans.append(plan), emit({"flops": 1})))
    report_parts.rehearse("step")(report_parts.GPU, found.append)
    ((plan,), (row,)) = plans, found
    assert row["rehearsed"] == "step"
    assert (plan.rounds, plan.step_rounds, plan.host_rounds) == (1, 1, 1)
    assert plan.size == report_parts.GPU.size
    assert plan.sides.keys() == {
        "gpt1_kernels, triton", "compiled transformers", "compiled plain PyTorch"
    }  # fmt: skip


def test_every_part_that_compiles_is_rehearsed_before_it_is_timed(monkeypatch):
    order, ran = list(PARTS), []
    rehearsals = {name: part for name, part in PARTS.items() if name.startswith("rehearse_")}
    for name in order:
        if name not in rehearsals:
            stub(monkeypatch, **{name: lambda plan, emit, name=name: ran.append(name)})
    for part in rehearsals.values():
        part.run(report_parts.GPU, lambda found: None)
    assert {*report_parts.OPS, "step", "host"} <= {*ran}
    assert max(map(order.index, rehearsals)) < min(map(order.index, ran))


def test_one_folder_has_no_results_of_two_gpus(tmp_path):
    earlier = {"device": "cuda", "machine": {"gpu": "NVIDIA H200"}, "parts": {"ceilings": PART}}
    record.write(earlier, tmp_path)
    with pytest.raises(SystemExit, match=f"{tmp_path} is of NVIDIA H200, and this is a CPU"):
        report(tmp_path)
    assert record.read(tmp_path) == earlier


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_report._commit() == "unknown"


def test_a_gpu_that_is_not_there_is_said_in_a_line(tmp_path):
    with pytest.raises(SystemExit, match="error: PyTorch finds no GPU; --device cpu --out FOLDER"):
        gpu_report.main(["--out", str(tmp_path / "record")])
    assert not (tmp_path / "record").exists()


def test_a_cpu_makes_no_record_among_those_of_gpus(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--device", "cpu"])
    assert "expected --out FOLDER" in capsys.readouterr().err


PROGRAM = """
import json, os, subprocess, sys, time
*_, how, file = sys.argv
with open(file, "a") as lines:
    lines.write(json.dumps({"found": 1}) + "\\n")
    lines.write('{"found": 2')  # and never the rest
if how == "raises": raise ValueError("as asked")
print("UserWarning: and no more", file=sys.stderr, flush=True)
if how == "dies": os.kill(os.getpid(), 11)
if how == "garbles": sys.stderr.buffer.write(b"\\xff, the end\\n"); sys.exit(2)
if how == "is silent": os.ftruncate(2, 0); os._exit(3)
if how == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(file, "a") as lines: lines.write('}\\n' + json.dumps({"child": child.pid}) + "\\n")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("ends", None),
        ("raises", "ValueError: as asked"),
        ("dies", signal.Signals.SIGSEGV.name),
        ("garbles", ", the end"),
        ("is silent", "exit(3)"),
        ("hangs", "it took longer than 3 s"),
    ],
)
def test_what_a_program_found_before_its_end_counts(how, problem):
    outcome = run_apart(["-c", PROGRAM, how], 3, ROOT)
    assert outcome.found[0] == {"found": 1}
    if problem is None:
        assert outcome.problem is None
    else:
        assert problem in outcome.problem.splitlines()[-1]  # which is the page's
    if how == "hangs":
        child = outcome.found[-1]["child"]
        deadline = time.monotonic() + 5
        while _is_running(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _is_running(child)


CHILD = """
import os, time
from benchmarks.apart import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
from pathlib import Path
from benchmarks.apart import run_apart
run_apart(["-c", {CHILD!r}], 60, Path())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends it")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_part_outlives_the_report(how):
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(how)
    deadline = time.monotonic() + 5
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(child)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends it")
def test_no_parity_test_outlives_its_part():
    """Which is killed when the report ends."""
    code = "from benchmarks.report_parts import *; parity(TINY, print)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as part:
        children = Path(f"/proc/{part.pid}/task/{part.pid}/children")
        while not (running := children.read_text().split()):
            time.sleep(0.01)
        time.sleep(0.5)  # until it is pytest
        part.kill()
    time.sleep(0.5)
    assert not any(_is_running(int(child)) for child in running)


def test_tests_that_are_not_there_are_left_out(tmp_path, monkeypatch):
    file, found = tmp_path / "test_some.py", []
    file.write_text("def test_portable(): pass")
    monkeypatch.setattr(report_parts, "PARITY_TESTS", file)
    plan = replace(TINY, parity=("portable and no_such_op", "1 +"))
    report_parts.parity(plan, found.append)
    record_of_it = {"parts": {"parity": {"problem": None, "found": found}}}
    assert record.left_out(record_of_it) == [
        ("parity", "portable and no_such_op", "there are no such tests here")
    ]
    assert record.failures(record_of_it) == [("parity", "1 +: pytest ended with 4")]


@pytest.mark.parametrize(
    ("changed", "nvcc", "found"),
    [
        (False, "nvcc", {"built": "before"}),
        (False, None, {"built": "before"}),
        (True, "nvcc", {"built": "for 9.0"}),
        (True, None, {"wrong": ["cuda: its sources were changed since; nvcc is not found"]}),
    ],
)
def test_kernels_of_older_sources_are_not_measured_unsaid(monkeypatch, changed, nvcc, found):
    emitted, commands = [], []
    monkeypatch.setattr(report_parts, "is_outdated", lambda name: changed)
    monkeypatch.setattr(report_parts, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(report_parts.extension, "absence", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        report_parts.subprocess, "run", lambda command, **options: commands.append(command)
    )
    report_parts.build(report_parts.GPU, emitted.append)
    assert emitted == [found]
    assert bool(commands) is (found == {"built": "for 9.0"})


def test_an_update_on_a_backend_that_is_not_here_is_left_out():
    """As its ops are: where nvcc is not found, nothing of ours is wrong."""
    sides = {**TINY.sides, "gpt1_kernels, cuda": Side("gpt1_kernels", backend="cuda")}
    found = []
    report_parts.measure_steps(replace(TINY, sides=sides), found.append)
    assert found[-1]["left_out"].keys() == {"gpt1_kernels, cuda"}
    assert found[-1]["wrong"] == []


def test_updates_that_take_their_time_lose_none_that_were_made(monkeypatch, tmp_path):
    """A comparison hands over at its end: what is killed before has lost all of its sides."""
    sides = {name: Side("gpt1_kernels", backend="portable") for name in ("one", "two", "three")}
    monkeypatch.setitem(report_parts.PLANS, "cpu", replace(TINY, sides=sides, step_rounds=50))
    clock, make_calls = [0.0], compare_models.make_calls

    def making(*args):
        clock[0] += 50
        return make_calls(*args)

    monkeypatch.setattr(compare_models, "make_calls", making)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    report_parts.main("step", "cpu", "120", str(tmp_path / "lines"))
    *rows, last = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert {row["implementation"]: len(row["seconds"]) for row in rows} == {
        "one": 1, "two": 1, "bare products": 1
    }  # fmt: skip
    assert last["left_out"].keys() == {"three"}
    assert "took all of the time" in last["left_out"]["three"]


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_by_its_name_appends_to_a_file(tmp_path):
    """As `run_apart` calls it."""
    report_parts.main("ceilings", "cpu", "20", str(tmp_path / "lines"))
    (line,) = (tmp_path / "lines").read_text().splitlines()
    assert json.loads(line).keys() == {"bandwidth", "rate"}


BANDWIDTH, RATE = 4e12, 8e14
FLOORS = [[4_000_000, 0]]  # 1 µs at that bandwidth


def op(name, direction, implementation, µs, dropout=False, peak=None, kind="peer"):
    return {
        "op": name, "dropout": dropout, "case": f"{name} {dropout}", "direction": direction,
        "implementation": implementation, "kind": kind, "seconds": [1e-6 * µs] * 3,
        "floors": FLOORS, "peak_bytes": peak,
    }  # fmt: skip


def update(implementation, kind, ms):
    return {
        "implementation": implementation, "kind": kind, "seconds": [1e-3 * ms] * 3,
        "tokens": 32768, "flops": 10**12, "peak_bytes": None,
    }  # fmt: skip


ATTENTION, SITE, LOSS = "causal_attention", "dropout_add_layer_norm", "linear_cross_entropy"
FOUND = [
    {"bandwidth": BANDWIDTH, "rate": RATE},
    op(ATTENTION, "both", "triton", 100), op(ATTENTION, "both", "cuda", 90),
    op(ATTENTION, "both", "triton", 120, True), op(ATTENTION, "both", "cuda", 126, True),
    op(ATTENTION, "both", "triton given bits", 104, True),
    op(ATTENTION, "both", "SDPA flash", 270, True), op(ATTENTION, "both", "SDPA cuDNN", 108),
    op(SITE, "forward", "triton", 1.25, True), op(SITE, "backward", "cuda", 1.6, True),
    op(SITE, "forward", "torch.compile", 2.5, True),
    op("gelu_ffn", "both", "cuda", 120), op("gelu_ffn", "both", "bare products", 100),
    op(LOSS, "both", "triton", 50, peak=300_000_000),
    op(LOSS, "both", "eager", 100, peak=9_000_000_000), op(LOSS, "both", "Liger", 90),
    op("embedding", "both", "cuda", 9, True), op("embedding", "both", "triton", 10, True),
    op(SITE, "both", "cuda", 9, True), op(SITE, "both", "triton", 9, True),
    *(op("dropout_mask", "forward", name, 9, True) for name in ("cuda", "triton")),
    op("layer_norm", "both", "cuda", 9), op("layer_norm", "both", "triton", 8),
    update("gpt1_kernels, triton", "ours", 40), update("gpt1_kernels, cuda", "ours", 50),
    update("transformers", "peer", 240), update("compiled plain PyTorch", "peer", 50),
]  # fmt: skip
EXPECTED = {
    "attention, x SDPA flash": ("triton", 2.25, True),
    "attention, x SDPA cuDNN without dropout": ("triton", 0.9, False),
    "attention, x FlashAttention-4 without dropout": None,
    "what dropout costs attention, bits drawn elsewhere": ("triton", 0.04, True),
    "what dropout costs attention, in line": ("triton", 0.2, True),
    "dropout + add + LayerNorm forward, of the copy's bandwidth": ("triton", 0.8, False),
    "backward with all gradients, of the copy's bandwidth": ("cuda", 0.625, False),
    "forward, x torch.compile": ("triton", 2.0, True),
    "backward, x torch.compile": None,
    "GELU-FFN, in the time of its six bare products": ("cuda", 1.2, False),
    "GELU-FFN, x torch.compile": None,
    "linear + cross-entropy, in the time of its three bare products": None,
    "linear + cross-entropy, x Liger": ("triton", 1.8, False),
    "linear + cross-entropy, peak memory, dh's 50 MB included": ("triton", 300.0, True),
    "eager's peak memory, in ours": ("triton", 30.0, True),
    "the whole update, tokens/s": ("gpt1_kernels, triton", 819_200.0, True),
    "the whole update, x transformers": ("gpt1_kernels, triton", 6.0, True),
    "the whole update, x compiled transformers": None,
    "the whole update, x compiled plain PyTorch": ("gpt1_kernels, triton", 1.25, False),
    "Triton, x CUDA where memory binds, the least": ("embedding", 0.9, False),
    "Triton, x CUDA in attention, the least": ("causal_attention", 0.9, True),
}
PART = {"commit": "c", "date": "2026-01-01", "seconds": 1.0, "problem": None, "found": FOUND}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.text)
def test_targets(target):
    best = target.best(Measured({"ops": PART}))
    expected = EXPECTED[target.text]
    if expected is None:
        assert best is None
        return
    name, value, met = expected
    assert best == (name, pytest.approx(value))
    assert target.is_met(best[1]) is met


@pytest.mark.parametrize("op", ["layer_norm", "dropout_mask"])
def test_the_least_of_several_ops_is_known_when_all_are_measured(op):
    """One that was wrong, or not reached, may be the least."""
    lacking = [r for r in FOUND if (r.get("op"), r.get("implementation")) != (op, "triton")]
    (target,) = (target for target in TARGETS if "where memory binds" in target.text)
    assert target.best(Measured({"ops": {**PART, "found": lacking}})) is None


def test_all_seven_targets_are_there():
    assert {target.number for target in TARGETS} == set(range(1, 8))
    assert {target.text for target in TARGETS} == EXPECTED.keys()


@pytest.mark.usefixtures("without_pictures")
def test_the_page_of_a_gpu_has_the_targets(tmp_path):
    machine = {"gpu": "NVIDIA H200", "packages": {"torch": "2.11.0"}}
    parts = {"ceilings": {**PART, "found": FOUND[:1]}, "ops": {**PART, "found": FOUND[1:]}}
    write_page({"device": "cuda", "machine": machine, "parts": parts}, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# NVIDIA H200\n")
    assert "| 1 | attention, x SDPA flash | ≥ 2.00x | 2.25x | triton | yes |" in page
    assert "| 2 | what dropout costs attention, in line | ≤ 30% | 20% | triton | yes |" in page
    assert "| 4 | GELU-FFN, x torch.compile | ≥ 1.15x | not measured |   |   |" in page
    assert "| 6 | the whole update, tokens/s | ≥ 700,000 | 819,200 | gpt1_kernels, triton |" in page


@pytest.mark.usefixtures("without_pictures")
def test_what_is_measured_without_the_ceilings_is_in_the_tables(tmp_path):
    """As by --only, or where a copy of 4 GiB does not fit."""
    machine = {"gpu": "NVIDIA H200", "packages": {}}
    parts = {"ops": {**PART, "found": FOUND[1:]}, "step": {**PART, "found": FOUND[-2:]}}
    write_page({"device": "cuda", "machine": machine, "parts": parts}, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| SDPA flash | 270 | 270-270 |   | 14.8 G |   |" in page
    assert "| compiled plain PyTorch | 50 | 50-50 | 655,360 | 20 T |   | 1.00 | 4.80 |   |" in page


def test_a_part_of_other_versions_says_so(tmp_path):
    """Parts of one folder may be from two days, and from two machines with the same GPU."""
    machine = {"gpu": "NVIDIA H200", "driver": "2", "packages": {"torch": "2.12"}}
    earlier = {"gpu": "NVIDIA H200", "driver": "1", "packages": {"torch": "2.11"}}
    part = {**PART, "found": []}
    parts = {"host": {**part, "machine": machine}, "step": {**part, "machine": earlier}}
    write_page({"device": "cuda", "machine": machine, "parts": parts}, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| commit c, 2026-01-01 | host |" in page
    assert "| commit c, 2026-01-01, driver 1, torch 2.11 | step |" in page


def test_names_of_targets_are_those_of_implementations():
    """A target that waits for a name that nothing has would be called not measured for ever."""
    from benchmarks.peers import YARDSTICKS, implementations

    names = {i.name for case in report_parts.GPU.cases for i in implementations(case)}
    names |= {name for name, _ in YARDSTICKS.values()} | report_parts.GPU.sides.keys()
    ops = {case.op for case in report_parts.GPU.cases}
    wanted = {row["implementation"] for row in FOUND if "implementation" in row}
    wanted |= {"FlashAttention-4", "compiled transformers"}
    assert wanted <= names
    assert {row["op"] for row in FOUND if "op" in row} <= ops


def test_a_gpus_short_name():
    assert gpu_report._short("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu_report._short("NVIDIA H200") == "h200"
    assert markdown(("a",), [("",)]) == "| a |\n| --- |\n|   |"
