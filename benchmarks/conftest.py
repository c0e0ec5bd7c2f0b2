"""Options of `pytest benchmarks/`, and the tables at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: bytes are counted on it

from benchmarks.replay import replay
from benchmarks.table import aligned

TABLES = pytest.StashKey[dict[str, list[Sequence[str]]]]()


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true",
        help="also what takes a CPU minutes: the paper's model, the bytes of all kernels",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[TABLES] = {}
    config.option.benchmark_quiet = True  # its table has neither floors nor peers
    config.addinivalue_line("markers", "full: takes minutes; needs --full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes minutes on a CPU: give --full"))


@pytest.fixture
def line(request) -> Callable[..., None]:
    """Adds a line to a table, which has the header of its first line."""
    tables = request.config.stash[TABLES]

    def add(table: str, header: Sequence[str], cells: Sequence[str]) -> None:
        tables.setdefault(table, [header]).append(cells)

    return add


@pytest.fixture
def recorded(benchmark, line) -> Callable[..., None]:
    """Records the rounds of a function, with a line in a table and figures in `extra_info`."""

    def add(table, header, cells, seconds, figures) -> None:
        benchmark.group = table
        benchmark.extra_info.update(figures)
        replay(benchmark, seconds)
        line(table, header, cells)

    return add


def pytest_terminal_summary(terminalreporter, config):
    for title, rows in config.stash[TABLES].items():
        terminalreporter.write_line("")
        terminalreporter.write_line(title, bold=True)
        for text in aligned(rows):
            terminalreporter.write_line(text)
