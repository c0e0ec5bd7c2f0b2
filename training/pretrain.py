"""Pre-trains GPT-1: `python training/pretrain.py`, or `--help` for the options."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from itertools import chain

import torch
from tqdm import tqdm

from training import cli, data, lstm, metrics, run
from training.checkpoint import CheckpointWriter
from training.config import PretrainConfig, complete, on_backend, require_backend
from training.memory import keep_freed_memory
from training.optim import make_optimizer, warmup_cosine
from training.plots import plot_runs
from training.sample import sample
from training.static_step import CapturedStep, StaticStep
from training.step import SkippedUpdates, autocast
from training.store import tokenised
from training.tokenizer import Tokenizer

VALIDATION_WINDOWS = 256
LOG_EVERY = 10
PROMPT_TOKENS, SAMPLE_TOKENS = 8, 60


def main(config: PretrainConfig) -> None:
    chosen = "" if config.preset else " (no --preset; the device decides)"
    config = complete(config)
    checkpoint = run.open_run(config)
    out, start = config.out, 0 if checkpoint is None else checkpoint.step
    torch.manual_seed(config.seed)

    model_config = lstm.shape(config.backbone, config.preset)
    length = model_config.n_positions
    corpus = data.Corpus(
        config.data, text_column=config.text_column, sentence_shuffled=config.sentence_shuffled,
        run=out,
    )  # fmt: skip
    if config.tokenizer is not None:
        tokenizer = Tokenizer.open(config.tokenizer, config.style)
    elif checkpoint is not None:
        tokenizer = Tokenizer.open(checkpoint.folder)
    else:
        tokenizer = Tokenizer.train(
            chain.from_iterable(corpus.train), config.vocab_size or model_config.vocab_size,
            style=config.style or "hf", at_most=config.vocab_size is None,
        )  # fmt: skip
    identity = run.identity(config, text=corpus.train.digest, vocabulary=tokenizer.fingerprint)
    if checkpoint is not None:
        run.require_same(checkpoint, identity)
        run.require_rest(checkpoint, out, config.steps)
        if start == config.steps and (result := run.read_result(out)):
            print(f"finished already, at step {start} of {config.steps}")
            print_result(result)
            return

    held_out_store = tokenised(corpus.validation, tokenizer)
    train, validation = tokenised(corpus.train, tokenizer).tokens, held_out_store.tokens
    data.require_window(train, validation, length, corpus.name)
    windows = data.Windows(train, length, config.batch_size, config.seed)
    held_out = data.spread_windows(validation, length, VALIDATION_WINDOWS)
    print(f"text: {len(train):,} tokens to train on, {len(validation):,} to validate on")

    model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
    model = lstm.backbone_of(model_config).language_model(model_config)
    model = model.to(config.device).train()
    model.dropout_stream.set_key(config.seed)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    skipped = SkippedUpdates(config.device)
    loss = math.nan  # of the last validation
    if checkpoint is not None:
        checkpoint.restore(model, optimizer)
        skipped = SkippedUpdates(config.device, checkpoint.state["skipped"])
        loss = checkpoint.state["validation_loss"]
        print(f"resumed from step {start} ({checkpoint.folder})")
    run.cut_logs(out, checkpoint)
    if config.device == "cpu":
        keep_freed_memory()
    make_update = (CapturedStep if config.cuda_graph else StaticStep)(
        torch.compile(model) if config.compile else model, model.dropout_stream, optimizer,
        (config.batch_size, length), accumulate=config.accumulate, clip=config.clip,
        dtype=config.dtype,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model: {config.preset}{chosen}, {parameters / 1e6:.1f} M parameters, vocabulary "
        f"{model_config.vocab_size}; {config.steps} updates of {config.batch_size} x {length} "
        f"tokens on {config.device} in {config.dtype}, backend {require_backend(config)}, to {out}"
    )

    options = asdict(config) | {"data": [data.absolute(path) for path in config.data]}
    run.write_json(out / run.CONFIG, options | {"text": corpus.train.digest})
    log = metrics.MetricsLog(out, start)
    writer = CheckpointWriter(out / run.CHECKPOINTS, config.keep)
    peak = metrics.measured_peak(config.device, config.dtype)
    flops = metrics.flops_per_token(model)
    prompt = tokenizer.decode(validation[:PROMPT_TOKENS])

    def validate(step: int) -> float:
        loss = metrics.mean_loss(model, held_out, config.batch_size, config.device, config.dtype)
        log.write(step, validation_loss=loss)
        return loss

    def write_sample(step: int) -> None:
        with autocast(config.device, config.dtype):
            text = (
                sample(model, tokenizer, prompt, SAMPLE_TOKENS, seed=config.seed)
                if math.isfinite(loss)
                else "(no text: the loss is not finite)"
            )
        metrics.append(out / "samples.txt", f"update {step}\n{text}\n\n")

    def save(step: int) -> None:
        state = {
            "identity": identity, "skipped": skipped.counts()[0], "validation_loss": loss,
            "log_sizes": run.log_sizes(out),
        }  # fmt: skip
        writer.save(step, model, optimizer, tokenizer, state)

    with on_backend(config.backend), run.StopSignal() as stop, tqdm(
        range(start, config.steps), initial=start, total=config.steps, unit="update",
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
        if start == 0:
            loss = validate(0)
            write_sample(0)
        tokens, clock = 0, time.perf_counter()  # since the last line of the log
        for step in bar:
            rate = config.learning_rate * warmup_cosine(step, config.warmup, config.steps)
            batch = windows.batch(step)
            update = make_update(pinned(batch, config.device), step, rate)
            skipped.note(step, update.finite)
            tokens += batch.numel()
            done = step + 1
            due = {
                name: done % getattr(config, name) == 0 or done == config.steps
                for name in ("eval_every", "sample_every", "checkpoint_every")
            }

            if step % LOG_EVERY == 0 or any(due.values()) or stop.received:
                total_skipped, in_a_row, last = skipped.counts()  # synchronises, for the clock
                if in_a_row >= config.max_skipped:
                    raise FloatingPointError(
                        f"updates {last - in_a_row + 1} to {last} skipped, loss or gradient not "
                        f"finite: {in_a_row} in a row (--max-skipped {config.max_skipped}); the "
                        f"batch of the last: {windows.describe(last)}"
                    )
                speed = tokens / (time.perf_counter() - clock)
                log.write(
                    step, loss=float(update.loss), learning_rate=rate,
                    gradient_norm=float(update.gradient_norm), skipped=total_skipped,
                    tokens_per_second=speed, flop_utilisation=speed * flops / peak,
                )  # fmt: skip
                bar.set_postfix_str(
                    f"loss {float(update.loss):.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s, "
                    f"MFU {speed * flops / peak:.0%}"
                )
                if due["eval_every"]:
                    loss = validate(done)
                if due["sample_every"]:
                    write_sample(done)
                if due["checkpoint_every"] or stop.received:
                    save(done)
                    if stop.received and done < config.steps:
                        writer.wait()
                        bar.close()
                        stop.end_process(done, out)
                tokens, clock = 0, time.perf_counter()
    writer.wait()

    model.save_pretrained(out / "model")
    tokenizer.save(out / "model")
    plot_runs([out], out / "loss.png")
    counted = metrics.baselines(train, held_out.numpy(), model_config.vocab_size)
    result = metrics.finite({
        "validation perplexity": metrics.perplexity(loss),
        "unigram": counted.unigram,
        "bigram": counted.bigram,
        "bits per byte": metrics.bits_per_byte(loss, len(validation), held_out_store.text_bytes),
    })  # fmt: skip
    run.write_json(out / run.RESULT, result)
    print_result(result)


def print_result(result: dict[str, float | None]) -> None:
    shown = {name: "not finite" if x is None else f"{x:.3f}" for name, x in result.items()}
    print(", ".join(f"{name} {value}" for name, value in shown.items()))


def pinned(batch: torch.Tensor, device: str) -> torch.Tensor:
    """The batch in memory from which a copy to the device does not keep the host waiting."""
    return batch.pin_memory() if device.startswith("cuda") else batch


if __name__ == "__main__":
    cli.run(main, PretrainConfig)
