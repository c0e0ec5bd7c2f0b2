"""Greedy decoding on a CPU against `transformers`, which has no key/value cache for GPT-1.

New tokens after a prompt of 16, one sequence, fp32, random weights. Both models must give the same
tokens before either is timed. With --benchmark-disable a tiny model runs once instead.
"""

from __future__ import annotations

import tempfile
from functools import cache
from statistics import median

import pytest
import torch

from benchmarks.replay import clock
from benchmarks.table import number
from benchmarks.timing import samples
from gpt1_kernels import GPT1Config, GPT1LMHeadModel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.benchmark(timer=clock)

SHAPES = {
    "tiny": GPT1Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2),
    "mini": GPT1Config.preset("mini", n_positions=512),
    "medium": GPT1Config(vocab_size=8192, n_embd=384, n_layer=6, n_head=6),
    "gpt1": GPT1Config.preset("gpt1"),
}
PROMPT, ROUNDS = 16, 3
MEASURED = [
    pytest.param("mini", 32, id="mini"),
    *(pytest.param(shape, 256, id=f"{shape}-full", marks=pytest.mark.full)
      for shape in ("mini", "medium", "gpt1")),
]  # fmt: skip


@pytest.mark.parametrize("library", ["gpt1_kernels", "transformers"])
@pytest.mark.parametrize(("shape", "new_tokens"), MEASURED)
def test_greedy_decoding(benchmark, recorded, shape, new_tokens, library):
    measured = (shape, new_tokens) if benchmark.enabled else ("tiny", 8)
    rounds = seconds_of_both(*measured)
    medians = {name: median(seconds) for name, seconds in rounds.items()}
    seconds, times = medians[library], medians["transformers"] / medians[library]
    recorded(
        f"{measured[0]}, {measured[1]} new tokens, {torch.get_num_threads()} threads",
        ("", "seconds", "tokens/s", "x transformers"),
        (library, number(seconds), number(measured[1] / seconds), f"{times:.2f}"),
        rounds[library], {"times_transformers": times},
    )  # fmt: skip


@cache
def seconds_of_both(shape: str, new_tokens: int) -> dict[str, list[float]]:
    """The rounds of each library, after they have given the same tokens."""
    torch.manual_seed(0)
    ours = GPT1LMHeadModel(SHAPES[shape]).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.OpenAIGPTLMHeadModel.from_pretrained(folder)
    ids = torch.randint(ours.config.vocab_size, (1, PROMPT))
    libraries = {
        "gpt1_kernels": lambda: ours.generate(ids, max_new_tokens=new_tokens),
        "transformers": lambda: theirs.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        ),
    }
    results = [generate() for generate in libraries.values()]
    assert torch.equal(*results), f"{shape}: the libraries disagree, nothing is timed"
    assert results[0].shape == (1, PROMPT + new_tokens)
    return samples(libraries, "cpu", ROUNDS)
