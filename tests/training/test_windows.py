"""Training under Windows' rules, as far as they can be imitated elsewhere."""

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.training.conftest import STEPS
from training import store

REPOSITORY = Path(__file__).parents[2]
ABSENT = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
"""Modules that Python has on Unix alone."""

fcntl = pytest.importorskip("fcntl", reason="runs on Windows for real there")


@pytest.mark.parametrize("folder", ["gpt1_kernels", "training"])
def test_no_module_is_imported_that_windows_lacks(folder):
    for file in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not modules & ABSENT, file


@pytest.fixture
def windows(monkeypatch):
    """Folders cannot be opened, files that are read cannot be synced, nor open ones renamed."""
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace")}

    def open_file(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real["open"](path, flags, *args, **kwargs)

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real["fsync"](descriptor)

    def renaming(name):
        def rename(source, target):
            held = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
            mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
            path = os.path.realpath(source)
            if f"{path}/" in mapped or any(h == path or h.startswith(f"{path}/") for h in held):
                raise PermissionError(32, "The process cannot access the file", str(source))
            real[name](source, target)

        return rename

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(name))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # which open folders
    monkeypatch.setattr(store.sys, "platform", "win32")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at open files in /proc")
def test_a_run_is_made_and_resumed_on_windows(run, whole, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT1_KERNELS_CACHE", str(tmp_path / "cache"))
    out, last = tmp_path / "out", f"checkpoints/step-{STEPS:08d}"
    run(out)
    (out / "result.json").unlink()
    shutil.rmtree(out / last)
    run(out)
    for name in ("model/model.safetensors", f"{last}/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
