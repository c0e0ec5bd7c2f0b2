"""Perplexity of each held-out document: `python training/evaluate.py RUN`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from gpt1_kernels import GPT1LMHeadModel
from training import cli, data, metrics, run
from training.config import default_device, require
from training.lstm import backbone_at
from training.store import tokenised
from training.tokenizer import Tokenizer

NAME_TOKENS = 10


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores a finished run on the documents that its training left out."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    batch_size: int = 16
    """Windows at a time."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: a GPU where there is one."""


def main(config: EvaluateConfig) -> None:
    require(config, ("batch_size",), lambda x: x >= 1, "at least 1")
    config = replace(config, device=str(default_device(config.device)))
    options = run.read_json(config.run / run.CONFIG) or {}
    if "text" not in options:
        raise ValueError(f"{config.run}: expected a run of pretrain.py")
    corpus = data.Corpus(
        options["data"], text_column=options["text_column"],
        sentence_shuffled=options["sentence_shuffled"], run=config.run,
    )  # fmt: skip
    if corpus.train.digest != options["text"]:
        raise ValueError(
            f"{corpus.name}: not as when {config.run} was trained, so what was held out is unknown"
        )
    folder = config.run / "model"
    model = backbone_at(folder).language_model.from_pretrained(folder).to(config.device)
    tokenizer = Tokenizer.open(folder)
    store = tokenised(corpus.validation, tokenizer)
    nats = tokens = 0
    for start, stop in tqdm(list(pairwise(store.bounds)), unit="text"):
        document = store.tokens[start:stop]
        if len(document) < 2:  # nothing to predict
            continue
        loss = mean_loss(model, document, config)
        nats, tokens = nats + loss * len(document), tokens + len(document)
        name = tokenizer.decode(document[:NAME_TOKENS])
        tqdm.write(f"{metrics.perplexity(loss):8.2f}  {len(document):9,} tokens  {name}")
    if not tokens:
        raise ValueError(f"{corpus.name}: expected a held-out document of 2 or more tokens")
    print(f"{metrics.perplexity(nats / tokens):8.2f}  {tokens:9,} tokens  all")


def mean_loss(model: GPT1LMHeadModel, tokens: np.ndarray, config: EvaluateConfig) -> float:
    """Mean negative log-likelihood, in nats, of a document cut into windows.

    Each window stands alone, so its first token is given and the next have little to go by. A
    document shorter than a window is one; what is left behind the last window does not count.
    """
    length = min(model.config.n_positions, len(tokens))
    windows = data.spread_windows(tokens, length, len(tokens) // length)
    return metrics.mean_loss(model, windows, config.batch_size, config.device, "fp32")


if __name__ == "__main__":
    cli.run(main, EvaluateConfig)
