"""What nvcc compiled for chips that are not here: ptxas' report, and the SASS of GPT-1's kernels.

Both lie where the build left them, in build/cuda: nothing is compiled here.
"""

import re
import subprocess
from functools import cache

import pytest

from csrc.build import FOLDERS
from gpt1_kernels.backends.cuda import extension
from gpt1_kernels.backends.logits import padded_vocabulary

pytest.importorskip("triton")  # whose package has cuobjdump
if (reason := extension.absence("cuda")) is not None:
    pytest.skip(f"backend cuda: {reason}", allow_module_level=True)

from benchmarks.sass import CUOBJDUMP, loop_accesses, matrix_units, narrow_accesses

REPORTS = sorted(FOLDERS["_cuda"].rglob("*.o.ptxas"))
if not REPORTS:
    pytest.skip("the compiled kernels were not built in this tree", allow_module_level=True)

KiB = 1024
REGISTERS = 65536  # of a processor of all three
SHARED_MEMORY = {80: 164 * KiB, 90: 228 * KiB, 100: 228 * KiB}  # of a processor
RESERVED = KiB  # of it, by a block
SMALLEST_SHARED_MEMORY = 99 * KiB  # that a block may have, of all chips from 8.0 on

ON_LARGE_CHIPS = {"causal_attention_bwd"}
"""Take more than a block of small chips has: the launcher asks, and there chooses other kernels."""

SHARED_AT_GPT1 = {"cross_entropy": 2 * padded_vocabulary(40478) + 256}
"""Of kernels that take less than they may, as a row of 40478 bf16 logits does."""

MULTIPLYING = {
    "causal_attention_bwd",
    "causal_attention_bwd_dkdv",
    "causal_attention_bwd_dq",
    "causal_attention_fwd",
    "dgelu_product",
    "gelu_product",
    "matmul",
}

UNALIGNED = "rows that are not aligned, by the element"
NARROW = {
    "causal_attention_bwd": (7, "words of dropout bits, and lse, one a row"),
    "causal_attention_bwd_dkdv": (3, "words of dropout bits, lse and delta, one a row"),
    "causal_attention_bwd_dq": (4, "words of dropout bits, one a row"),
    "causal_attention_fwd": (8, "words of dropout bits, one a row"),
    "dropout_mask": (6, f"the seed; {UNALIGNED}"),
    "embedding_bwd": (130, f"the seed; {UNALIGNED}"),
    "embedding_bwd_positions": (66, f"the seed; {UNALIGNED}"),
    "embedding_bwd_runs": (4, "an id a partial sum"),
    "embedding_fwd": (218, f"ids, each with its record of errors; the seed; {UNALIGNED}"),
    "layer_norm_bwd": (121, f"w, mean and rstd; the seed; {UNALIGNED}"),
    "layer_norm_fwd": (118, f"w, b and x_bias, mean and rstd; the seed; {UNALIGNED}"),
    "scale_gradient": (7, "the scale; bf16 beside fp32; what remains behind the last vector"),
}
"""How many narrow accesses a kernel's loops may hold although they weigh, and what they are."""

NOT_GPT1 = re.compile(
    r"6__half"
    r"|(?:LayerNorm|Embedding)\w*?If"  # fp32
    r"|Attention\w+Li(?:32|96|128)E"  # D
    r"|RowLayout\w+Li(?:8|16)E"  # other C than 768
)
"""Kernels that GPT-1 in bf16 does not launch; their SASS is not looked at, for time."""

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<capability>\d+)a?'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers[^\n]*",
    re.S,
)


@cache
def reported(capability: int) -> list[dict]:
    """What ptxas says of each kernel; the test is skipped if it was built for other chips."""
    rows = [
        {"object": report.with_suffix(""), "used": entry[0].splitlines()[-1], **entry.groupdict()}
        for report in REPORTS
        for entry in _ENTRY.finditer(report.read_text())
        if int(entry["capability"]) == capability
    ]
    if not rows:
        pytest.skip(f"the kernels were not built for compute capability {capability / 10}")
    return rows


@cache
def kernels() -> dict[str, dict]:
    """What the module says of its kernels, by symbol."""
    return {kernel["symbol"]: kernel for kernel in extension.module("cuda").kernels()}


@cache
def disassembled(capability: int) -> list[tuple[str, str]]:
    """(name, SASS) of each kernel that GPT-1 launches."""
    symbols: dict = {}
    for row in reported(capability):
        if not NOT_GPT1.search(row["symbol"]):
            symbols.setdefault(row["object"], []).append(row["symbol"])
    parts = []
    for file, names in symbols.items():
        command = [CUOBJDUMP, "-sass", "-arch", f"sm_{capability}", "-fun", ",".join(names), file]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = text.split("Function : ")[1:]
        assert len(functions) == len(names), (file, names)
        parts += [(kernels()[part.split()[0]]["name"], part) for part in functions]
    return parts


def resident_blocks(capability: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel a processor holds at a time."""
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps  # in four parts, of whole warps
    by_shared = SHARED_MEMORY[capability] // (-(-shared // 128) * 128 + RESERVED)
    return min(by_registers, by_shared, 2048 // threads, 32)


on_each_chip = pytest.mark.parametrize("capability", list(SHARED_MEMORY))


@on_each_chip
def test_ptxas_reports_every_kernel_of_the_module_once(capability):
    """A kernel in two objects would be prepared in one of them alone."""
    assert sorted(row["symbol"] for row in reported(capability)) == sorted(kernels())


@on_each_chip
def test_no_stack_no_spills_and_no_static_shared_memory(capability):
    for row in reported(capability):
        assert row["stack"] == row["stores"] == row["loads"] == "0", row
        assert "smem" not in row["used"], row


@on_each_chip
def test_the_blocks_that_a_kernel_counts_on_fit_a_processor(capability):
    for row in reported(capability):
        kernel = kernels()[row["symbol"]]
        if kernel["name"] in ON_LARGE_CHIPS and capability < 90:
            continue
        shared = SHARED_AT_GPT1.get(kernel["name"], kernel["max_shared_bytes"])
        blocks = resident_blocks(capability, kernel["threads"], int(row["registers"]), shared)
        assert blocks >= kernel["blocks_per_processor"], (row, kernel, blocks)


def test_every_chip_has_the_shared_memory_of_a_block():
    large = {
        k["name"] for k in kernels().values() if k["max_shared_bytes"] > SMALLEST_SHARED_MEMORY
    }
    assert large == ON_LARGE_CHIPS


@on_each_chip
def test_products_are_on_the_matrix_units_and_accesses_wide(capability):
    for name, text in disassembled(capability):
        assert ("HMMA" in matrix_units(text)) is (name in MULTIPLYING), name
        accesses = loop_accesses(text)
        assert 16 in accesses, name
        allowed, _ = NARROW.get(name, (0, ""))
        assert len(narrow_accesses(accesses)) <= allowed, (name, sorted(accesses))


def test_no_exemption_is_for_a_kernel_that_is_gone():
    names = {kernel["name"] for kernel in kernels().values()}
    assert NARROW.keys() | MULTIPLYING | ON_LARGE_CHIPS | SHARED_AT_GPT1.keys() <= names
