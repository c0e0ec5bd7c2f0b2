"""What nvcc compiled for chips that are not here, where it was built beside these sources."""

import pytest

pytest.importorskip("triton")  # whose package has cuobjdump

from benchmarks import baseline, cuda_code
from benchmarks.cuda_code import disassembled, entries, for_hopper, kernels
from benchmarks.sass import loop_accesses, matrix_units, narrow_accesses
from gpt1_kernels.backends.logits import padded_vocabulary

if (reason := cuda_code.absence()) is not None:
    pytest.skip(reason, allow_module_level=True)

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
    "layer_norm_bwd": (145, f"w, mean and rstd; the seed; {UNALIGNED}"),
    "layer_norm_fwd": (118, f"w, b and x_bias, mean and rstd; the seed; {UNALIGNED}"),
    "matmul": (12, "the scale, and four columns of the bias, to a strip of 16 rows, on Hopper"),
    "scale_gradient": (7, "the scale; bf16 beside fp32; what remains behind the last vector"),
}
"""How many narrow accesses a kernel's loops may hold although they weigh, and what they are."""


def reported(capability: int) -> list[dict]:
    """The entries for a chip; the test is skipped if the kernels were built for others."""
    rows = cuda_code.reported(capability)
    if not rows:
        pytest.skip(f"the kernels were not built for compute capability {capability / 10}")
    return rows


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
    expected = [symbol for symbol in kernels() if capability == 90 or not for_hopper(symbol)]
    assert sorted(row["symbol"] for row in reported(capability)) == sorted(expected)


@on_each_chip
def test_no_stack_no_spills_and_no_static_shared_memory(capability):
    for row in reported(capability):
        assert row["stack"] == row["stores"] == row["loads"] == 0, row
        assert "smem" not in row["used"], row


@on_each_chip
def test_the_blocks_that_a_kernel_counts_on_fit_a_processor(capability):
    for row in reported(capability):
        kernel = kernels()[row["symbol"]]
        if kernel["name"] in ON_LARGE_CHIPS and capability < 90:
            continue
        shared = SHARED_AT_GPT1.get(kernel["name"], kernel["max_shared_bytes"])
        blocks = resident_blocks(capability, kernel["threads"], row["registers"], shared)
        assert blocks >= kernel["blocks_per_processor"], (row, kernel, blocks)


def test_kernels_for_hopper_are_launched_with_the_registers_that_they_share_out():
    """Of a warpgroup that fetches, others claim what it releases: kLaunchedRegisters a thread."""
    for row in reported(90):
        if for_hopper(row["symbol"]):
            threads = kernels()[row["symbol"]]["threads"]
            assert row["registers"] == REGISTERS // threads // 8 * 8, row


def test_every_chip_has_the_shared_memory_of_a_block():
    everywhere = [k for k in kernels().values() if not k["for_hopper"]]
    large = {k["name"] for k in everywhere if k["max_shared_bytes"] > SMALLEST_SHARED_MEMORY}
    assert large == ON_LARGE_CHIPS


@on_each_chip
def test_products_are_on_the_matrix_units_and_accesses_wide(capability):
    reported(capability)
    for symbol, text in disassembled(capability).items():
        name = kernels()[symbol]["name"]
        units = "HGMMA" if for_hopper(symbol) else "HMMA"
        assert (units in matrix_units(text)) is (name in MULTIPLYING), name
        assert ("UTMALDG" in text) is for_hopper(symbol), name
        accesses = loop_accesses(text)
        assert 16 in accesses, name
        allowed, _ = NARROW.get(name, (0, ""))
        assert len(narrow_accesses(accesses)) <= allowed, (name, sorted(accesses))


@on_each_chip
def test_the_code_is_the_baselines(capability):
    if reason := baseline.mismatch("cuda", cuda_code.versions()):
        pytest.skip(reason)
    reported(capability)
    baseline.check("cuda", cuda_code.rows(capability))


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
ptxas info    : Function properties for _Z5firstv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
ptxas info    : Function properties for _Z6secondv
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cmem[0]
"""


def test_a_spill_and_static_shared_memory_are_seen():
    first, second = entries(REPORT)
    assert "512 bytes smem" in first["used"]
    assert (first["symbol"], first["capability"], first["registers"]) == ("_Z5firstv", 80, 40)
    assert (second["symbol"], second["capability"]) == ("_Z6secondv", 90)
    assert (second["stack"], second["stores"], second["loads"]) == (24, 16, 8)


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks"),
    [
        pytest.param(80, 128, 255, 64 * KiB, 2, id="shared-memory"),
        pytest.param(90, 128, 168, 64 * KiB, 3, id="registers"),
        pytest.param(90, 512, 65, 0, 1, id="registers-of-whole-warps"),
        pytest.param(90, 1024, 16, 0, 2, id="threads"),
        pytest.param(100, 32, 16, 0, 32, id="blocks"),
        pytest.param(80, 256, 32, 164 * KiB, 0, id="none"),
    ],
)
def test_resident_blocks(capability, threads, registers, shared, blocks):
    assert resident_blocks(capability, threads, registers, shared) == blocks


def test_no_exemption_is_for_a_kernel_that_is_gone():
    names = {kernel["name"] for kernel in kernels().values()}
    assert NARROW.keys() | MULTIPLYING | ON_LARGE_CHIPS | SHARED_AT_GPT1.keys() <= names
