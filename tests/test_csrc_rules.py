"""CUDA kernels see memory and the chip through csrc/platform/ alone, so a CPU can check them."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
OPS = sorted(
    folder.name for folder in CSRC.iterdir()
    if folder.is_dir() and folder.name not in ("common", "platform", "__pycache__")
)  # fmt: skip
FILES = sorted(
    path for path in CSRC.rglob("*")
    if path.suffix in (".h", ".cuh", ".cu", ".cpp") and "platform" not in path.parts
)  # fmt: skip

FORBIDDEN = {
    "a raw dereference": r"(?:^|[=(,;{!&|?:<+-]|\breturn)\s*\*+\s*[A-Za-z_(]",
    "a pointer's member": r"[\w)\]]->",
    "a view's pointer": r"\bdata_\b|\.address\(",
    "a cast of pointers": r"\breinterpret_cast\b|static_cast<[^>]*\*\s*>|"
    r"\(\s*(?:const )?\w+\s*\*+\s*\)\s*\w",
    "inline PTX": r"\basm\b",
    "static shared memory": r"\b__shared__\b",
    "CUDA's own names": r"\b(?:threadIdx|blockIdx|blockDim|gridDim|atomic[A-Z]\w*"
    r"|cuda[A-Z]\w*)\b|\b__(?!device__|forceinline__|host__)\w+\(|<<<",
    "conditional compilation": r"^\s*#\s*(?:if|ifdef|ifndef|elif|else|endif)\b",
    "a header of PyTorch": r"#\s*include\s*[<\"](?:torch|ATen|c10)/",
    "a header of CUDA": r"#\s*include\s*[<\"](?:cuda|mma)\w*\.h",
}  # fmt: skip


def code_of(text: str) -> str:
    """C++ without its comments, line by line."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    return re.sub(r"//.*", "", text)


def found(what: str, code: str) -> list[str]:
    lines = code_of(code).splitlines()
    return [f"{n}: {line}" for n, line in enumerate(lines, 1) if re.search(FORBIDDEN[what], line)]


def test_lines_have_110_columns_at_the_most():
    long = [
        f"{path.relative_to(CSRC)}:{n}: {len(line)} columns"
        for path in CSRC.rglob("*.[ch]*")
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 110
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_outside_the_platform_there_is_no(what):
    assert FILES
    hits = [
        f"{path.relative_to(CSRC)}:{hit}" for path in FILES for hit in found(what, path.read_text())
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a raw dereference", "float x = *p;"),
        ("a raw dereference", "    *p.data = 1.0f;"),
        ("a raw dereference", "return *rows;"),
        ("a raw dereference", "f(*(x + 1));"),
        ("a pointer's member", "p->x = 1;"),
        ("a view's pointer", "return x.data_[3];"),
        ("a view's pointer", "load(x.address(3));"),
        ("a cast of pointers", "auto y = reinterpret_cast<float>(x);"),
        ("a cast of pointers", "float y = *static_cast<float*>(x);"),
        ("a cast of pointers", "auto y = (const float*)x;"),
        ("CUDA's own names", "__threadfence();"),
        ("CUDA's own names", "y = __expf(x);"),
        ("inline PTX", 'asm volatile("bar.sync 0;");'),
        ("static shared memory", "__shared__ float memory[32];"),
        ("CUDA's own names", "int i = threadIdx.x;"),
        ("CUDA's own names", "atomicAdd(sum, x);"),
        ("CUDA's own names", "kernel<<<1, 32>>>(x);"),
        ("conditional compilation", "#ifdef __CUDACC__"),
        ("a header of PyTorch", "#include <torch/extension.h>"),
        ("a header of CUDA", "#include <cuda_bf16.h>"),
    ],
)
def test_a_forbidden_line_is_found(what, line):
    assert found(what, line)


@pytest.mark.parametrize(
    "line",
    [
        "x = a * b;",
        "f(a) * g(b);",
        "// *p",
        "[](int i) -> int { return 2 * i; }",
        "T* x;",
        "a *= b;",
    ],
)
def test_a_line_that_is_allowed_is_not(line):
    assert not any(found(what, line) for what in FORBIDDEN)


@pytest.mark.parametrize("op", OPS)
def test_a_folder_is_an_op_s_declaration_kernels_and_launchers(op):
    """`<op>.h`, which bindings.cpp includes, beside kernels in .cuh and launchers in .cu files."""
    names = {path.name for path in (CSRC / op).iterdir()}
    assert f"{op}.h" in names
    assert any(name.endswith("_launch.cu") for name in names)
    assert any(name.endswith(".cuh") for name in names)
    assert f'#include "{op}/{op}.h"' in (CSRC / "bindings.cpp").read_text()
