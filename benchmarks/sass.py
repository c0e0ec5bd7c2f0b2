"""What SASS, the machine code, says of a kernel: its loops, memory accesses, use of tensor cores.

`text` is everywhere what `disassembled` returns of one kernel.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CUOBJDUMP, NVDISASM = TOOLS / "cuobjdump", TOOLS / "nvdisasm"
WIDE_SHARE = 0.95  # of the bytes that loops move, 16 or more at a time

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ACCESSES = ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG")
_MATRIX_UNITS = ("HMMA", "HGMMA", "UTCHMMA", "UTCHMMA2")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

BULK_BYTES = 64
"""Of a TMA copy, which does not say its size: taken as a tile of 8 KB over 128 threads."""


def machine_code(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """The symbol and the instructions of each kernel in a cubin, an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    for at, _, _, _, start, length in sections:
        at += sections[names][4]
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if name.startswith(".text."):
            yield name.removeprefix(".text."), cubin[start : start + length]


def disassembled(codes: Sequence[bytes], chip: str) -> list[str]:
    """The SASS of each of these instructions for a chip such as "90a".

    All at once, since nvdisasm takes half a second to start: addresses go on from one to the next.
    """
    if not codes:
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [NVDISASM, "--binary", f"SM{chip}", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends = list(accumulate(map(len, codes)))
    lines: list[list[str]] = [[] for _ in codes]
    for line in text.splitlines():
        if instruction := _INSTRUCTION.search(line):
            lines[bisect(ends, int(instruction[1], 16))].append(line)
    return list(map("\n".join, lines))


def _instructions(text: str) -> list[tuple[int, list[str], str]]:
    """(address, parts of the opcode, operands) of each."""
    return [(int(a, 16), o.split("."), rest) for a, o, rest in _INSTRUCTION.findall(text)]


def _loops(instructions: list[tuple[int, list[str], str]]) -> list[tuple[int, int]]:
    """First and last address of each."""
    branches = [
        (address, opcode, int(target[1], 16))
        for address, opcode, operands in instructions
        if opcode[0] == "BRA" and (target := re.search(r"0x([0-9a-f]+)\s*$", operands))
    ]
    # What diverged warps do stands behind the kernel, and jumps back: that is no loop.
    outlying = min((t for _, opcode, t in branches if "DIV" in opcode), default=inf)
    return [(t, a) for a, _, t in branches if t < a < outlying]


def loop_accesses(text: str) -> list[int]:
    """Bytes a thread moves by each access to global memory in loops, or by all if none has any."""
    instructions = _instructions(text)
    loops = _loops(instructions)
    everywhere, inside = [], []
    for address, opcode, _ in instructions:
        if opcode[0] in _ACCESSES:
            bulk = opcode[0].startswith("UTMA")
            moved = BULK_BYTES if bulk else next((_BYTES[p] for p in opcode if p in _BYTES), 4)
            everywhere.append(moved)
            if any(start <= address <= end for start, end in loops):
                inside.append(moved)
    return inside or everywhere


def narrow_accesses(accesses: list[int]) -> list[int]:
    """Those of less than 16 bytes, if they move more than they may beside the wide ones."""
    narrow = [n for n in accesses if n < 16]
    return narrow if sum(narrow) > (1 - WIDE_SHARE) * sum(accesses) else []


def wide_share(accesses: list[int]) -> float:
    """The share of the bytes that move 16 or more at a time, to three digits."""
    return round(sum(n for n in accesses if n >= 16) / sum(accesses), 3)


def main_loop(text: str) -> int:
    """Instructions of the loop with most of the kernel's work in it.

    It is the shortest loop with at least half as many tensor-core instructions as the loop with
    most: a loop over masked tiles has as many as the one over the others, and does more besides.
    Without such instructions it is the longest innermost loop; without loops, the whole kernel.
    """
    instructions = _instructions(text)
    loops = {
        (start, end): [opcode[0] for address, opcode, _ in instructions if start <= address <= end]
        for start, end in _loops(instructions) or [(0, inf)]
    }
    products = {
        span: sum(opcode in _MATRIX_UNITS for opcode in body) for span, body in loops.items()
    }
    if any(products.values()):
        most = max(products.values())
        return min(len(loops[span]) for span, n in products.items() if 2 * n >= most)
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    return max(len(loops[span]) for span in innermost)


def matrix_units(text: str) -> set[str]:
    """Which of HMMA (8.0), HGMMA (9.0), UTCHMMA (10.0) a kernel uses."""
    return {opcode[0] for _, opcode, _ in _instructions(text)} & set(_MATRIX_UNITS)
