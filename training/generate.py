"""Continues text: `python training/generate.py --model RUN --prompt "..."`, or `--help`.

Without a prompt it continues every line that is typed, each on its own, until the input ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt1_kernels import GPT1LMHeadModel
from training import cli
from training.config import require
from training.lstm import backbone_at, model_folder
from training.sample import sample
from training.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt, or every line that is typed."""

    model: Path
    """A run of pretrain.py, or a Hugging Face folder with its tokenizer."""
    prompt: str | None = None
    """Text to continue. Default: the lines of the standard input, one by one."""
    tokens: int = 60
    """The most tokens to add."""
    temperature: float = 0.8
    """Of the draws; 0 takes the likeliest token."""
    top_k: int | None = 40
    """Draws from the k likeliest tokens only; None for all."""
    top_p: float = 1.0
    """Draws from the fewest likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Of the draws."""
    stop: str | None = None
    """A word or mark of one token, such as ".", after which the text ends."""


def main(config: GenerateConfig) -> None:
    require(config, ("seed",), lambda x: 0 <= x < 2**63, "0 to 2^63 - 1")
    model, tokenizer = open_model(config.model)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{config.model}: weights that are not finite, of a run that diverged")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "stop_token": None if config.stop is None else single_token(tokenizer, config.stop),
        # One stream of draws for all lines: a line that is typed twice goes on differently.
        "seed": torch.Generator(model.device).manual_seed(config.seed),
    }
    if config.prompt is not None and not config.prompt.strip():
        raise ValueError(f"--prompt: {config.prompt!r}, expected some text")
    require(config, ("tokens",), lambda x: x >= 1, "at least 1")
    for prompt in typed_lines() if config.prompt is None else [config.prompt]:
        length, limit = len(tokenizer.encode(prompt)), model.config.n_positions
        if length + config.tokens <= limit:
            print(sample(model, tokenizer, prompt, config.tokens, **options), flush=True)
            continue
        message = (
            f"--tokens: a prompt of {length} tokens and {config.tokens} new ones, expected at most "
            f"the model's {limit} positions together"
        )
        if config.prompt is not None:
            raise ValueError(message)
        print(f"error: {message}", file=sys.stderr, flush=True)  # the next line may be shorter


def open_model(folder: Path) -> tuple[GPT1LMHeadModel, Tokenizer]:
    """The model and the tokenizer of a run of `pretrain.py` or of a Hugging Face folder.

    Raises:
        FileNotFoundError: there is no model, or no tokenizer with it.
        ValueError: a file is damaged.
    """
    folder = model_folder(folder)
    model = backbone_at(folder).language_model.from_pretrained(folder)
    return model, Tokenizer.open(folder)


def single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one token of the vocabulary.

    Raises:
        ValueError: it is not.
    """
    ids = tokenizer.encode(text).tolist()
    if len(ids) != 1 or ids == [0]:
        raise ValueError(f"--stop: {text!r} is {len(ids)} tokens, expected one that is known")
    return ids[0]


def typed_lines() -> Iterator[str]:
    """The lines of the standard input that are not blank, asked for where someone sits there."""
    ask = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask)
        except EOFError:
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    cli.run(main, GenerateConfig)
