"""What a disassembled kernel says about itself: its accesses to global memory, its matrix units."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ACCESSES = ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG")
_MATRIX_UNITS = ("HMMA", "HGMMA", "UTCHMMA", "UTCHMMA2")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

BULK_BYTES = 64
"""A bulk copy does not say how much it moves: 8 KB, one tile, shared by the 128 threads of it."""


def _instructions(text: str) -> list[tuple[int, list[str], str]]:
    """(address, parts of the opcode, operands) of each."""
    return [(int(a, 16), o.split("."), rest) for a, o, rest in _INSTRUCTION.findall(text)]


def loop_accesses(text: str) -> list[int]:
    """Bytes a thread moves by each access to global memory inside loops, or by all if none has any.

    Args:
        text: what `cuobjdump -sass` prints of one kernel.
    """
    instructions = _instructions(text)
    branches = [
        (address, opcode, int(target[1], 16))
        for address, opcode, operands in instructions
        if opcode[0] == "BRA" and (target := re.search(r"0x([0-9a-f]+)\s*$", operands))
    ]
    # What diverged warps do stands behind the kernel, and jumps back: that is no loop.
    outlying = min((t for _, opcode, t in branches if "DIV" in opcode), default=float("inf"))
    loops = [(t, a) for a, _, t in branches if t < a < outlying]
    everywhere, inside = [], []
    for address, opcode, _ in instructions:
        if opcode[0] in _ACCESSES:
            bulk = opcode[0].startswith("UTMA")
            moved = BULK_BYTES if bulk else next((_BYTES[p] for p in opcode if p in _BYTES), 4)
            everywhere.append(moved)
            if any(start <= address <= end for start, end in loops):
                inside.append(moved)
    return inside or everywhere


def matrix_units(text: str) -> set[str]:
    """Which of HMMA (8.0), HGMMA (9.0), UTCHMMA (10.0) a kernel uses."""
    return {opcode[0] for _, opcode, _ in _instructions(text)} & set(_MATRIX_UNITS)
