"""What nvcc made of the CUDA kernels: ptxas' report, and the SASS of those that GPT-1 launches.

Both lie where the build left them, in build/cuda: nothing is compiled here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from benchmarks import sass
from csrc.build import FOLDERS, is_outdated, sources
from gpt1_kernels.backends.cuda import extension

OBJECTS = [FOLDERS["_cuda"] / f"{source}.o" for source in sources(False) if source.suffix == ".cu"]

OUTDATED = "its sources were changed since it was built"

NOT_GPT1 = re.compile(
    r"6__half"
    r"|(?:LayerNorm|Embedding)\w*?If"  # fp32
    r"|Attention\w+Li(?:32|96|128)E"  # D
    r"|RowLayout\w+Li(?:8|16)E"  # other C than 768
)
"""Kernels that GPT-1 in bf16 does not launch; their SASS is not looked at, for time."""

HOPPER_FORMS = {"HopperFormILb1E": " ping-pong", "HopperFormILb0E": " cooperative"}
"""What a symbol says of the form of a kernel for Hopper; both have its name."""

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<capability>\d+)a?'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<used>(?P<registers>\d+) registers[^\n]*)",
    re.S,
)
_RELEASE = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


def absence() -> str | None:
    """Why there is nothing to look at, or None."""
    if (reason := extension.absence("cuda")) is not None:
        return f"backend cuda: {reason}"
    if not all(path.exists() for path in OBJECTS):
        return "the compiled kernels were not built in this tree"
    if is_outdated("_cuda"):
        return OUTDATED
    return None


def versions() -> dict[str, str]:
    """What the code depends on beside its source: the compiler, as it signed an object."""
    return {"nvcc": _RELEASE.search(OBJECTS[0].read_bytes())[1].decode()}


def entries(report: str) -> list[dict]:
    """What ptxas says of each kernel; all that it says it uses is `used`."""
    numbers = ("capability", "stack", "stores", "loads", "registers")
    return [
        {"symbol": entry["symbol"], "used": entry["used"], **{n: int(entry[n]) for n in numbers}}
        for entry in _ENTRY.finditer(report)
    ]


@cache
def reported(capability: int) -> list[dict]:
    """The entries for a chip, none if the kernels were built for others."""
    return [
        {"object": path, **entry}
        for path in OBJECTS
        for entry in entries(path.with_suffix(".o.ptxas").read_text())
        if entry["capability"] == capability
    ]


@cache
def kernels() -> dict[str, dict]:
    """What the module says of its kernels, by symbol."""
    return {kernel["symbol"]: kernel for kernel in extension.module("cuda").kernels()}


def for_hopper(symbol: str) -> bool:
    """Whether a kernel is compiled for 9.0a alone."""
    return kernels()[symbol]["for_hopper"]


@cache
def disassembled(capability: int) -> dict[str, str]:
    """The SASS of each kernel that GPT-1 launches, by symbol."""
    launched = [row for row in reported(capability) if not NOT_GPT1.search(row["symbol"])]
    symbols, texts = {row["symbol"] for row in launched}, {}
    for hopper in (False, True):
        chip = f"{capability}{'a' * hopper}"
        objects = dict.fromkeys(r["object"] for r in launched if for_hopper(r["symbol"]) is hopper)
        kernels = [k for path in objects for k in sass.machine_code(_cubin(path, chip))]
        codes = {symbol: code for symbol, code in kernels if symbol in symbols}
        texts |= zip(codes, sass.disassembled([*codes.values()], chip), strict=True)
    assert texts.keys() == symbols
    return texts


def _cubin(path: Path, chip: str) -> bytes:
    """What an object has for a chip such as "90a"."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sass.CUOBJDUMP, "-xelf", f".sm_{chip}.", path]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def rows(capability: int) -> dict[str, dict[str, float]]:
    """What the baseline keeps of each kernel; those of one name and form are in symbols' order."""
    registers = {row["symbol"]: row["registers"] for row in reported(capability)}
    found, seen = {}, Counter()
    for symbol, text in sorted(disassembled(capability).items()):
        form = "".join(text for mark, text in HOPPER_FORMS.items() if mark in symbol)
        name = f"{capability / 10}{'a' * for_hopper(symbol)}: {kernels()[symbol]['name']}{form}"
        seen[name] += 1
        found[f"{name}, {seen[name]}"] = {
            "registers": registers[symbol],
            "shared": kernels()[symbol]["max_shared_bytes"],
            "main_loop": sass.main_loop(text),
            "wide share": sass.wide_share(sass.loop_accesses(text)),
        }
    return found
