"""Pre-trains GPT-1: `python training/pretrain.py`, or `--help` for the options."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from gpt1_kernels import GPT1Config, GPT1LMHeadModel, use_backend
from training import data, metrics
from training.config import PretrainConfig, complete
from training.optim import make_optimizer, warmup_cosine
from training.plots import plot_run
from training.sample import sample
from training.step import train_step
from training.store import tokenised
from training.tokenizer import Tokenizer

VALIDATION_WINDOWS = 256
LOG_EVERY = 10
PROMPT_TOKENS, SAMPLE_TOKENS = 8, 60


def main(config: PretrainConfig) -> None:
    chosen = "" if config.preset else " (no --preset; the device decides)"
    config = complete(config)
    out = new_folder(config.out)
    torch.manual_seed(config.seed)

    model_config = GPT1Config.preset(config.preset)
    length = model_config.n_positions
    corpus = data.Corpus(config.data)
    tokenizer = Tokenizer.train(
        chain.from_iterable(corpus.train),
        config.vocab_size or model_config.vocab_size,
        at_most=config.vocab_size is None,
    )
    validation_store = tokenised(corpus.validation, tokenizer)
    train, validation = tokenised(corpus.train, tokenizer).tokens, validation_store.tokens
    data.require_window(train, validation, length, corpus.name)
    windows = data.Windows(train, length, config.batch_size, config.seed)
    held_out = data.spread_windows(validation, length, VALIDATION_WINDOWS)
    print(f"text: {len(train):,} tokens to train on, {len(validation):,} to validate on")

    model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
    model = GPT1LMHeadModel(model_config).to(config.device).train()
    model.dropout_stream.set_key(config.seed)
    step_model = torch.compile(model) if config.compile else model
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model: {config.preset}{chosen}, {parameters / 1e6:.1f} M parameters, vocabulary "
        f"{model_config.vocab_size}; {config.steps} updates of {config.batch_size} x {length} "
        f"tokens on {config.device} in {config.dtype}, to {out}"
    )

    (out / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
    log = metrics.MetricsFile(out / "metrics.jsonl")
    peak = metrics.measured_peak(config.device, config.dtype)
    flops = metrics.flops_per_token(model_config)
    prompt = tokenizer.decode(validation[:PROMPT_TOKENS])

    def validate(step: int) -> float:
        loss = metrics.mean_loss(model, held_out, config.batch_size, config.device, config.dtype)
        log.write(step=step, validation_loss=loss)
        text = sample(model, tokenizer, prompt, SAMPLE_TOKENS, seed=config.seed)
        with (out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"update {step}, validation loss {loss:.3f}\n{text}\n\n")
        return loss

    choice = contextlib.nullcontext() if config.backend == "auto" else use_backend(config.backend)
    with choice, tqdm(range(config.steps), unit="update", dynamic_ncols=True) as bar:
        loss = validate(0)
        tokens, clock = 0, time.perf_counter()  # since the last line of the log
        for step in bar:
            rate = config.learning_rate * warmup_cosine(step, config.warmup, config.steps)
            batch = windows.batch(step)
            train_loss, norm = train_step(
                step_model, model.dropout_stream, optimizer, to_device(batch, config.device), step,
                rate, accumulate=config.accumulate, clip=config.clip, dtype=config.dtype,
            )  # fmt: skip
            tokens += batch.numel()
            due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
            if step % LOG_EVERY == 0 or due:
                value = float(train_loss)  # waits for the device, so that the clock is right
                if not math.isfinite(value):
                    raise FloatingPointError(f"update {step}: the loss is {value}")
                speed = tokens / (time.perf_counter() - clock)
                log.write(
                    step=step, loss=value, learning_rate=rate, gradient_norm=float(norm),
                    tokens_per_second=speed, flop_utilisation=speed * flops / peak,
                )  # fmt: skip
                bar.set_postfix_str(
                    f"loss {value:.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s, "
                    f"MFU {speed * flops / peak:.0%}"
                )
                if due:
                    loss = validate(step + 1)
                tokens, clock = 0, time.perf_counter()

    model.save_pretrained(out / "model")
    tokenizer.save(out / "model")
    plot_run(log.path, out / "loss.png")
    counted = metrics.baselines(train, held_out.numpy(), model_config.vocab_size)
    print(
        f"validation perplexity {math.exp(loss):.2f}, unigram {counted.unigram:.2f}, bigram "
        f"{counted.bigram:.2f}, bits per byte "
        f"{metrics.bits_per_byte(loss, len(validation), validation_store.text_bytes):.3f}"
    )


def new_folder(folder: Path) -> Path:
    """Creates the folder of a run.

    Raises:
        FileExistsError: it holds something already, which a new run would overwrite.
        NotADirectoryError: it, or a folder above it, is a file.
        PermissionError: it cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(f"--out: {folder} is a file, expected a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--out: {folder} is not empty, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out: {folder} cannot be written to")
    return folder


def to_device(batch: torch.Tensor, device: str) -> torch.Tensor:
    """A copy on the device; to a GPU from pinned memory, so that the host need not wait for it."""
    if not device.startswith("cuda"):
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(PretrainConfig))
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
