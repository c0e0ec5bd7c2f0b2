"""Runs that are interrupted: what goes on equals, bit for bit, what was not stopped."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tests.training.conftest import EVERY, STEPS
from training import checkpoint, evaluate, metrics, static_step
from training import run as run_folder
from training.config import PretrainConfig
from training.evaluate import EvaluateConfig
from training.finetune_config import FinetuneConfig
from training.run import LOCK, StopSignal, cut_logs, identity, next_folder, require_same, write_json
from training.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
CLOCK = {"tokens_per_second", "flop_utilisation"}


def log_of(out: Path) -> list[dict]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_same_run(out: Path, whole: Path, steps: int = STEPS) -> None:
    """Weights, moments, samples and results to the bit; the log but for the clock."""
    last = f"checkpoints/step-{steps:08d}"
    for name in (
        "model/model.safetensors", f"{last}/model.safetensors", f"{last}/optimizer.safetensors",
        "samples.txt", "result.json",
    ):  # fmt: skip
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    interrupted = {row["step"]: row for row in log_of(out) if "loss" in row}
    for row in log_of(whole):
        if "loss" in row:
            assert interrupted[row["step"]] == row
    assert [row for row in log_of(out) if "validation_loss" in row] == [
        row for row in log_of(whole) if "validation_loss" in row
    ]


def interrupt_once(monkeypatch, owner, name: str, call: int, signum: int) -> None:
    """Sends a signal to this process at the call-th call of owner.name, before it does its work."""
    original, calls = getattr(owner, name), iter(range(10_000))

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "signum"),
    [
        (metrics, "mean_loss", 1, signal.SIGTERM),
        (checkpoint.CheckpointWriter, "_write", 0, signal.SIGTERM),
        (static_step, "train_step", 4, signal.SIGTERM),
        (static_step, "train_step", 4, signal.SIGINT),
        (static_step, "train_step", STEPS - 1, signal.SIGTERM),
    ],
    ids=["evaluation", "save", "update", "update-Ctrl-C", "last-update"],
)
def test_row29_a_signal_saves_and_the_run_goes_on(
    run, whole, tmp_path, monkeypatch, capsys, owner, name, call, signum
):
    with monkeypatch.context() as patch:
        interrupt_once(patch, owner, name, call, signum)
        if call == STEPS - 1:
            run(tmp_path)  # there is nothing left to stop
        else:
            with pytest.raises(SystemExit) as stopped:
                run(tmp_path)
            assert stopped.value.code == 128 + signum
            assert f"{signal.Signals(signum).name}: saved at step" in capsys.readouterr().out
            run(tmp_path)
            assert "resumed from step" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


def test_row29_an_interrupted_lstm_goes_on_to_the_same_bits(
    run, whole_lstm, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        interrupt_once(patch, static_step, "train_step", 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path, backbone="lstm")
    run(tmp_path, backbone="lstm")
    assert "resumed from step 5" in capsys.readouterr().out
    assert_same_run(tmp_path, whole_lstm)
    losses = [row["validation_loss"] for row in log_of(tmp_path) if "validation_loss" in row]
    assert losses[-1] < losses[0] - 0.05


def test_row29_a_signal_between_two_looks_at_it_does_not_stop_a_run_that_did_not_save(
    run, tmp_path, monkeypatch
):
    class Late(StopSignal):
        looks = 0

        @property
        def received(self):
            self.looks += 1
            return None if self.looks == 1 else signal.SIGTERM

        @received.setter
        def received(self, value):
            pass

    monkeypatch.setattr(run_folder, "StopSignal", Late)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints") is not None


def test_a_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "kills", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["one-kill", "many-kills"]
)
def test_row29_killed_at_random_moments(corpus, tmp_path, kills):
    """kill -9, some time after the run has come further than its last start."""
    rng, steps = random.Random(kills), 20 * (kills + 1)
    command = [
        sys.executable, str(REPOSITORY / "training" / "pretrain.py"), "--preset", "mini", "--data",
        str(corpus), "--steps", str(steps), "--batch-size", "2", "--vocab-size", "200",
        "--checkpoint-every", "2", "--eval-every", "10", "--device", "cpu", "--resume", "auto",
    ]  # fmt: skip
    # Kernels in Triton's interpreter would take minutes: here as a user would, without.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = {"env": {**environment, "PYTHONPATH": str(REPOSITORY)}, "text": True}

    def newest() -> int:
        found = (tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")
        return max((int(path.name[5:]) for path in found), default=0)

    starts = []
    for _ in range(kills):
        started_at = newest()
        with subprocess.Popen(
            [*command, "--out", str(tmp_path / "killed")], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, **options,
        ) as process:  # fmt: skip
            while newest() == started_at and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            starts.append("resumed from step" in process.communicate()[0])
    assert starts == [False] + [True] * (kills - 1)
    for out in ("killed", "whole"):
        end = subprocess.run(
            [*command, "--out", str(tmp_path / out)], capture_output=True, check=True, **options
        )
        assert ("resumed from step" in end.stdout) == (out == "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps)


def test_a_finished_run_says_so_and_changes_nothing(run, whole, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    run(out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"finished already, at step {STEPS} of {STEPS}"
    assert lines[-1].startswith("validation perplexity")
    assert log_of(out) == log_of(whole)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0\.5 \(was 0\.002\)"),
        ({"backbone": "lstm"}, r"backbone lstm \(was transformer\)"),
        ({"steps": 12, "seed": 1}, r"seed 1 \(was 0\); steps 12 \(was 9\)"),
    ],
)
def test_a_changed_configuration_is_refused_with_the_difference(run, whole, changes, difference):
    with pytest.raises(ValueError, match=difference):
        run(whole, **changes)


def test_what_decides_on_the_bits_of_a_run():
    both = {
        "batch_size", "clip", "dtype", "learning_rate", "preset", "seed", "warmup", "weight_decay",
    }  # fmt: skip
    assert identity(PretrainConfig()).keys() == both | {"backbone", "steps", "style", "vocab_size"}
    assert identity(FinetuneConfig()).keys() == both | {
        "classifier_dropout", "epochs", "lm_weight", "n_transfer", "task", "train_examples",
        "truncation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "current"), [({"a": 1, "b": 2}, {"a": 1}), ({"a": 1}, {"a": 1, "b": 2})]
)
def test_a_setting_of_one_of_two_runs_tells_them_apart(saved, current):
    start = checkpoint.Checkpoint(Path("run"), 3, {"identity": saved})
    with pytest.raises(ValueError, match=r"another configuration: b (None|2) \(was (None|2)\)"):
        require_same(start, current)


@pytest.mark.parametrize(("size", "left"), [(4, "one\n"), (99, "one\ntwo\n")])
def test_logs_are_cut_to_what_they_were_at_the_start(tmp_path, size, left):
    for name in ("metrics.jsonl", "samples.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    start = checkpoint.Checkpoint(
        tmp_path / "checkpoints" / "step-00000003", 3, {"log_sizes": {"metrics.jsonl": size}}
    )
    cut_logs(tmp_path, start)
    assert (tmp_path / "metrics.jsonl").read_text() == left
    assert (tmp_path / "samples.txt").read_text() == ""


def test_another_tokenizer_is_refused(run, whole, tmp_path):
    settings = {"vocab_size": None, "steps": 1}
    run(tmp_path / "run", tokenizer=whole / "model", **settings)
    Tokenizer.train(["other words"], 60, at_most=True).save(tmp_path / "other")
    with pytest.raises(ValueError, match="another configuration: vocabulary"):
        run(tmp_path / "run", tokenizer=tmp_path / "other", **settings)


def test_a_changed_text_is_refused(run, whole, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "text")
    with (tmp_path / "text" / "0.txt").open("a") as file:
        file.write("abc")
    with pytest.raises(ValueError, match="another configuration: text"):
        run(whole, data=(str(tmp_path / "text"),))


def test_what_a_run_writes_is_no_text_though_a_pattern_finds_it(run, corpus, tmp_path, capsys):
    """The text had changed when the run was resumed or evaluated."""
    shutil.copytree(corpus, tmp_path / "text")
    settings = {"data": (f"{tmp_path}/**/*.txt",), "steps": 1}
    run(tmp_path / "run", **settings)
    run(tmp_path / "run", **settings)
    assert "finished already" in capsys.readouterr().out
    evaluate.main(EvaluateConfig(tmp_path / "run", device="cpu"))


def test_never_asks_for_a_new_folder_and_a_path_is_taken(run, whole, tmp_path, capsys):
    with pytest.raises(FileExistsError, match="is not empty, expected a new folder"):
        run(whole, resume="never")
    assert run_folder.open_run(PretrainConfig(out=tmp_path / "new", resume="never")) is None
    with pytest.raises(FileNotFoundError, match=r"--resume: .*nowhere is no checkpoint"):
        run(tmp_path / "a", resume=str(tmp_path / "nowhere"))
    before_last = whole / "checkpoints" / f"step-{STEPS - EVERY:08d}"
    run(tmp_path / "b", resume=str(before_last))
    assert f"resumed from step {STEPS - EVERY}" in capsys.readouterr().out
    name = "model/model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (whole / name).read_bytes()


def test_the_same_command_goes_on_with_a_fork_too(run, whole, tmp_path, monkeypatch, capsys):
    """Killed before its first checkpoint, stopped behind it, and finished."""
    start = STEPS - EVERY
    fork = {"resume": str(whole / "checkpoints" / f"step-{start:08d}"), "eval_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "mean_loss", None)  # called when the first update is in the log
        with pytest.raises(TypeError):
            run(tmp_path, **fork)
    with monkeypatch.context() as patch:
        interrupt_once(patch, static_step, "train_step", 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path, **fork)
    assert capsys.readouterr().out.count(f"resumed from step {start} ({whole}") == 2
    run(tmp_path, **fork)
    assert f"resumed from step {start + 2} ({tmp_path}" in capsys.readouterr().out
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == list(range(start, STEPS))
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_fork_from_the_last_step_is_refused_and_writes_nothing(run, whole, tmp_path):
    with pytest.raises(ValueError, match=f"step-0*{STEPS} is at the last of {STEPS} steps"):
        run(tmp_path, resume=str(whole))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_killed_while_it_writes_its_options_starts_anew(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "sync", killed)
        with pytest.raises(Killed):
            run(tmp_path, steps=1)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "config.partial"}
    run(tmp_path, steps=1)
    assert run_folder.read_result(tmp_path)


@pytest.mark.parametrize("kept", ["model", "result.json"])
def test_a_folder_that_is_no_interrupted_run_is_refused(run, whole, tmp_path, kept):
    """A model, whose config.json is not a run's, and a finished run without its checkpoints."""
    out = tmp_path / "copy"
    if kept == "model":
        shutil.copytree(whole / "model", out)
    else:
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoints"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="copy is not empty, expected a new folder"):
        run(out, seed=5)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.fixture
def another_run():
    """another_run(folder): locks it as the run of another process does."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path) -> None:
            folder.mkdir(parents=True)
            stack.enter_context(FileLock(folder / LOCK))

        yield start


def test_a_folder_that_another_run_is_in_is_refused(run, tmp_path, another_run):
    another_run(tmp_path / "taken")
    with pytest.raises(FileExistsError, match=r"--out: .*taken is in use by another run"):
        run(tmp_path / "taken")


def test_a_run_that_ends_before_the_lock_is_ours_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim = run_folder._claim

    def claim_late(folder: Path) -> bool:
        if folder.name != "mini-2":
            write_json(folder / "result.json", {})
        return claim(folder)

    monkeypatch.setattr(run_folder, "_claim", claim_late)
    with pytest.raises(FileExistsError, match="taken is not empty, expected a new folder"):
        run_folder.open_run(PretrainConfig(out=tmp_path / "taken"))
    assert next_folder("mini") == Path("runs/mini-2")


def test_a_run_starts_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(lock, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert run_folder.open_run(PretrainConfig(out=tmp_path / "out")) is None


def test_a_run_without_a_name_starts_in_no_folder_of_another(tmp_path, monkeypatch, another_run):
    monkeypatch.chdir(tmp_path)
    another_run(Path("runs/mini-1"))
    assert next_folder("mini") == Path("runs/mini-2")
    lock = FileLock(f"runs/mini-2/{LOCK}")
    with pytest.raises(Timeout):  # nor does another get a share of its own
        lock.acquire(timeout=0)
    assert next_folder("other") == Path("runs/other-1")
    lock.acquire(timeout=0)  # left by the run that is in another
    lock.release()
    assert next_folder("mini") == Path("runs/mini-2")  # a lock alone is no run
    same = PretrainConfig(out=tmp_path / "runs" / "mini-2")
    assert run_folder.open_run(same) is None  # by another path


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_what_holds_no_object_is_read_as_nothing(tmp_path, content):
    (tmp_path / "file").write_text(content)
    assert run_folder.read_json(tmp_path / "file") is None


def test_a_run_without_a_name_leaves_no_lock_in_a_folder_of_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mini-1").mkdir(parents=True)
    Path("runs/mini-1/notes").touch()
    assert next_folder("mini") == Path("runs/mini-2")
    assert [path.name for path in Path("runs/mini-1").iterdir()] == ["notes"]


def test_a_damaged_result_is_made_again(run, whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    (out / "result.json").write_text("")
    run(out)
    assert (out / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_another_frequency_of_watching_changes_no_weight(run, whole, tmp_path):
    run(tmp_path, eval_every=4, sample_every=5, checkpoint_every=2, keep=1)
    weights = "model.safetensors"
    last = f"checkpoints/step-{STEPS:08d}"
    for name in (f"model/{weights}", f"{last}/{weights}", "result.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert re.findall(r"^update (\d+)$", (tmp_path / "samples.txt").read_text(), re.M) == [
        "0", "5", str(STEPS),
    ]  # fmt: skip


@pytest.mark.parametrize("saved", [1, 2])
def test_row29_a_full_disk_stops_the_run_and_loses_nothing(
    run, whole, tmp_path, monkeypatch, capsys, saved
):
    """The second or the last save finds no room; the one before is what the run goes on from."""
    save_file, calls = checkpoint.save_file, iter(range(10))

    def full(*args):
        if next(calls) == saved:
            raise SafetensorError("No space left on device (os error 28)")
        save_file(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        failed = f"step-{(saved + 1) * EVERY:08d}: .* could not be written, .*No space"
        with pytest.raises(OSError, match=failed):
            run(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    capsys.readouterr()
    run(tmp_path)
    assert f"resumed from step {saved * EVERY}" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_row29_a_result_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("{}")
    file.with_suffix(".partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_json(file, {"unigram": 1.0})
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "{}"
    write_json(file, {"unigram": 1.0})
    assert list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text()) == {"unigram": 1.0}


def test_row29_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/samples.txt'"):
        metrics.append(tmp_path / "samples.txt", "text")


def test_row29_a_vanished_text_is_named_and_nothing_is_lost(run, corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "text")
    with monkeypatch.context() as patch:
        interrupt_once(patch, static_step, "train_step", 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", data=(str(tmp_path / "text"),))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="text: no such file or folder"):
        run(tmp_path / "run", data=(str(tmp_path / "text"),))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_row30_updates_that_are_not_finite_stop_the_run_with_step_and_batch(run, tmp_path):
    """At this rate the first real update, number 1, leaves weights whose loss overflows."""
    rare = dict.fromkeys(("eval_every", "checkpoint_every"), 40)
    with pytest.raises(FloatingPointError) as raised:
        run(tmp_path, learning_rate=1e30, warmup=1, max_skipped=9, steps=40, **rare)
    message = str(raised.value)
    assert message.startswith("updates 2 to 10 skipped, loss or gradient not finite: 9 in a row")
    assert message.endswith("the batch of the last: 2 windows from number 20 of epoch 0")
    updates = [row for row in log_of(tmp_path) if "loss" in row]
    assert [(row["step"], row["skipped"]) for row in updates] == [(0, 0)]


def test_row30_skipped_updates_are_counted_on(run, tmp_path, monkeypatch):
    diverging = {"learning_rate": 1e30, "warmup": 1, "max_skipped": 99}
    with monkeypatch.context() as patch:
        interrupt_once(patch, static_step, "train_step", 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path, **diverging)
    run(tmp_path, **diverging)
    skipped = {row["step"]: row["skipped"] for row in log_of(tmp_path) if "loss" in row}
    assert (skipped[4], skipped[8]) == (3, 7)


def test_row30_a_diverged_run_ends_in_a_result_that_is_json(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "mean_loss", lambda *_: 1000.0)
    for _ in ("run", "read back"):
        run(tmp_path, steps=1)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("validation perplexity not finite, unigram")
    assert json.loads((tmp_path / "result.json").read_text())["validation perplexity"] is None
