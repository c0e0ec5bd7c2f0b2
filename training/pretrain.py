"""Pre-trains GPT-1: `python training/pretrain.py`, or `--help` for the options."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict
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
from training.tokenizer import encode, train_tokenizer

VALIDATION_WINDOWS = 256
PROMPT = "the president"


def main(config: PretrainConfig) -> None:
    config = complete(config)
    out = new_folder(config.out)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
    torch.manual_seed(config.seed)

    train_text, validation_text = data.split(data.read_documents(config.data), config.seed)
    own_vocabulary = config.preset == "gpt1"
    tokenizer = train_tokenizer(train_text, config.vocab_size, at_most=own_vocabulary)
    train, validation = encode(tokenizer, train_text), encode(tokenizer, validation_text)
    print(f"text: {len(train):,} tokens to train on, {len(validation):,} to validate on")

    model_config = GPT1Config.preset(config.preset, vocab_size=tokenizer.get_vocab_size())
    model = GPT1LMHeadModel(model_config).to(config.device).train()
    model.dropout_stream.set_key(config.seed)
    length = model_config.n_positions
    data.require_window("training text", train, length)
    data.require_window("validation text", validation, length)
    held_out = data.consecutive_windows(validation, length, VALIDATION_WINDOWS)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model: {config.preset}, {parameters / 1e6:.1f} M parameters, "
        f"vocabulary {model_config.vocab_size}, {config.steps} updates of {config.batch_size} x "
        f"{length} tokens on {config.device} in {config.dtype}"
    )

    step_model = torch.compile(model) if config.compile else model
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    log = metrics.MetricsFile(out / "metrics.jsonl")
    peak = metrics.measured_peak(config.device, config.dtype)
    flops = metrics.flops_per_token(model_config)
    tokens_per_step = config.batch_size * length

    def validate(step: int) -> float:
        loss = metrics.mean_loss(model, held_out, config.batch_size, config.device, config.dtype)
        log.write(step=step, validation_loss=loss)
        text = sample(model, tokenizer, PROMPT, 60, seed=config.seed)
        with (out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"update {step}, validation loss {loss:.3f}\n{text}\n\n")
        return loss

    choice = contextlib.nullcontext() if config.backend == "auto" else use_backend(config.backend)
    with choice, tqdm(range(config.steps), unit="update", dynamic_ncols=True) as bar:
        loss = validate(0)
        for step in bar:
            start = time.perf_counter()
            rate = config.learning_rate * warmup_cosine(step, config.warmup, config.steps)
            batch = data.windows(train, length, config.batch_size, config.seed, step)
            train_loss, norm = train_step(
                step_model, model.dropout_stream, optimizer, batch.to(config.device), step, rate,
                accumulate=config.accumulate, clip=config.clip, dtype=config.dtype,
            )  # fmt: skip
            if step % 10 == 0 or step == config.steps - 1:
                value = float(train_loss)
                if not math.isfinite(value):
                    raise FloatingPointError(f"update {step}: the loss is {value}")
                speed = tokens_per_step / (time.perf_counter() - start)
                log.write(
                    step=step, loss=value, learning_rate=rate, gradient_norm=float(norm),
                    tokens_per_second=speed, flop_utilisation=speed * flops / peak,
                )  # fmt: skip
                bar.set_postfix_str(
                    f"loss {value:.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s, "
                    f"MFU {speed * flops / peak:.0%}"
                )
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                loss = validate(step + 1)

    model.save_pretrained(out / "model")
    tokenizer.save(str(out / "model" / "tokenizer.json"))
    plot_run(log.path, out / "loss.png")
    counted = metrics.baselines(train, held_out.numpy(), model_config.vocab_size)
    text_bytes = len(tokenizer.decode(held_out.flatten().tolist()).encode())
    bpb = metrics.bits_per_byte(loss, held_out.numel(), text_bytes)
    print(f"wrote {out}")
    print(
        f"validation perplexity {math.exp(loss):.2f}, unigram {counted.unigram:.2f}, "
        f"bigram {counted.bigram:.2f}, bits per byte {bpb:.3f}"
    )


def new_folder(folder: Path) -> Path:
    """Creates the folder of a run.

    Raises:
        FileExistsError: it holds something already, which a new run would overwrite.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--out: {folder} is not empty, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    try:
        main(tyro.cli(PretrainConfig))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
