"""Greedy decoding on the CPU against `transformers`, which has no key/value cache for GPT-1.

256 new tokens after a prompt of 16, one sequence, fp32, random weights. Both models must give the
same tokens before either is timed. With --benchmark-disable a tiny model runs once instead.
"""

import tempfile
from functools import cache

import pytest
import torch

from gpt1_kernels import GPT1Config, GPT1LMHeadModel

transformers = pytest.importorskip("transformers")

SHAPES = {
    "tiny": GPT1Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2),
    "mini": GPT1Config.preset("mini", n_positions=512),
    "medium": GPT1Config(vocab_size=8192, n_embd=384, n_layer=6, n_head=6),
    "gpt1": GPT1Config.preset("gpt1"),
}
PROMPT, NEW = 16, 256
ROUNDS = 3


@pytest.mark.parametrize("library", ["gpt1_kernels", "transformers"])
@pytest.mark.parametrize("shape", ["mini", "medium", "gpt1"])
def test_greedy_decoding(benchmark, shape, library):
    benchmark.group = f"{shape}, {NEW} new tokens, {torch.get_num_threads()} threads"
    measured = (shape, NEW) if benchmark.enabled else ("tiny", 8)
    generate = same_tokens_from_both(*measured)[library]
    assert benchmark.pedantic(generate, rounds=ROUNDS).shape == (1, PROMPT + measured[1])


@cache
def same_tokens_from_both(shape, new_tokens):
    """A function of no arguments for each library, after they have given the same tokens."""
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
    return libraries
