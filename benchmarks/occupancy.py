"""Occupancy: how many programs a multiprocessor holds at once (CUDA Programming Guide)."""

from __future__ import annotations

from typing import NamedTuple

REGISTERS, SCHEDULERS = 65536, 4  # of a processor; a warp and its registers belong to a scheduler


class Chip(NamedTuple):
    """What a processor holds at once."""

    warps: int
    programs: int
    shared: int  # KiB


CHIPS = {
    80: Chip(64, 32, 164), 86: Chip(48, 16, 100), 89: Chip(48, 24, 100),
    90: Chip(64, 32, 228), 100: Chip(64, 32, 228), 120: Chip(48, 24, 100),
}  # fmt: skip
"""By ten times the compute capability."""


def resident_programs(chip: Chip, warps: int, registers: int, shared: int) -> tuple[int, int]:
    """How many programs fit for their registers and warps, and how many for their shared memory.

    A warp takes registers in units of 256; a program costs a KiB of shared memory beside its own.

    Args:
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
    """
    of_warp = -(-32 * registers // 256) * 256
    held = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
    by_registers = min(chip.programs, chip.warps // warps, held // warps)
    return by_registers, min(chip.programs, chip.shared * 1024 // (shared + 1024))
