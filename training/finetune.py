"""Fine-tunes GPT-1 on a task: `python training/finetune.py --task sst2 …`, or `--help`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

from gpt1_kernels import GPT1Config, GPT1Model, GPT1TaskModel
from gpt1_kernels.pretrained import WEIGHTS
from gpt1_kernels.task_model import HEAD_KEY
from training import cli, metrics, run, scores, submissions
from training.batches import Batch, Buckets, by_length, collate
from training.checkpoint import CheckpointWriter
from training.config import on_backend, require_backend
from training.examples import Task, TaskData, chosen, load
from training.finetune_config import CUSTOM, FinetuneConfig, complete
from training.inputs import N_SPECIALS, Encoded, encode
from training.lstm import backbone_at, backbone_of, model_folder
from training.optim import make_optimizer, warmup_linear
from training.plots import plot_predictions
from training.step import SkippedUpdates, apply_losses, autocast, weights_in
from training.tasks import TASKS, custom_task
from training.tokenizer import Tokenizer

LOG_EVERY = 10
SUMMARY = "summary.json"


@dataclass(frozen=True, eq=False)
class Setup:
    """What the runs of all seeds share."""

    task: Task
    data: TaskData
    tokenizer: Tokenizer
    shape: GPT1Config
    """Of the pre-trained model, or of the preset."""
    pretrained: GPT1Model | None
    digest: str
    """Of the pre-trained weights, the task and its examples, but for those to test on."""
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]


def main(config: FinetuneConfig) -> None:
    config = complete(config)
    setup = prepare(config)
    if config.seeds == 1:
        finetune(config, setup)
        return
    spreads = scores.spread([result["validation"] for result in finetune_seeds(config, setup)])
    summary = {name: asdict(spread) for name, spread in spreads.items()}
    values = {"seeds": list(seeds_of(config)), "validation": summary}
    run.write_json(config.out / SUMMARY, values)
    for name, s in spreads.items():
        print(
            f"{name} over {config.seeds} seeds: median {s.median:.3f} ({s.low:.3f} to "
            f"{s.high:.3f}), mean {s.mean:.3f}, 95 % interval {s.interval[0]:.3f} to "
            f"{s.interval[1]:.3f}"
        )


def seeds_of(config: FinetuneConfig) -> range:
    """--seeds of them, from --seed on."""
    return range(config.seed, config.seed + config.seeds)


def finetune_seeds(config: FinetuneConfig, setup: Setup, goes_on: Path | None = None) -> list[dict]:
    """A run for each seed, into the folders `seed-N` of `config.out`. Returns their results.

    Args:
        goes_on: the --out with which all of it goes on after a signal; by default `config.out`.
    """
    return [
        finetune(
            replace(config, seed=seed, out=config.out / f"seed-{seed}"), setup,
            goes_on or config.out,
        )
        for seed in seeds_of(config)
    ]  # fmt: skip


def finetune(config: FinetuneConfig, setup: Setup, goes_on: Path | None = None) -> dict:
    """One run, with one seed. Returns what `result.json` holds. See `finetune_seeds`."""
    checkpoint = run.open_run(config)
    out, start = config.out, 0 if checkpoint is None else checkpoint.step
    task, data, tokenizer = setup.task, setup.data, setup.tokenizer
    buckets = Buckets(
        np.array([example.length for example in setup.train]), config.batch_size, config.seed
    )
    epoch = buckets.per_epoch
    total = epoch * config.epochs
    checkpoint_every = config.checkpoint_every or epoch

    identity = run.identity(config, inputs=setup.digest, vocabulary=tokenizer.fingerprint)
    if checkpoint is not None:
        run.require_same(checkpoint, identity)
        run.require_rest(checkpoint, out, total)
        if start == total and (result := run.read_result(out)):
            print(f"finished already, at step {start} of {total}")
            print_result(result)
            return result

    torch.manual_seed(config.seed)
    model = make_model(config, setup).to(config.device).train()
    model.dropout_stream.set_key(config.seed)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    skipped = SkippedUpdates(config.device)
    best_epoch, best_score = 0, None
    if checkpoint is not None:
        checkpoint.restore(model, optimizer)
        skipped = SkippedUpdates(config.device, checkpoint.state["skipped"])
        if run.is_own(checkpoint, out):  # else that epoch's model is elsewhere
            best_epoch, best_score = checkpoint.state["best"]
        print(f"resumed from step {start} ({checkpoint.folder})")
    run.cut_logs(out, checkpoint)
    print(
        f"{config.task}: {len(setup.train):,} examples to train on, {len(setup.validation):,} to "
        f"validate on; {config.epochs} epochs of {epoch} updates of {config.batch_size} examples "
        f"on {config.device} in {config.dtype}, backend {require_backend(config)}, to {out}"
    )

    run.write_json(out / run.CONFIG, asdict(config))
    log = metrics.MetricsLog(out, start)
    writer = CheckpointWriter(out / run.CHECKPOINTS, config.keep)

    def save(step: int) -> None:
        state = {
            "identity": identity, "skipped": skipped.counts()[0], "best": [best_epoch, best_score],
            "log_sizes": run.log_sizes(out),
        }  # fmt: skip
        writer.save(step, model, optimizer, tokenizer, state)

    with on_backend(config.backend), run.StopSignal() as stop, tqdm(
        range(start, total), initial=start, total=total, unit="update", dynamic_ncols=True
    ) as bar:  # fmt: skip
        examples, clock = 0, time.perf_counter()  # since the last line of the log
        for step in bar:
            rate = config.learning_rate * warmup_linear(step, config.warmup, total)
            batch = collate([setup.train[i] for i in buckets.batch(step)])
            seeds = model.dropout_stream.seeds(step)
            losses = micro_losses(model, batch, seeds, config, task)
            update = apply_losses(model, optimizer, losses, rate, clip=config.clip)
            skipped.note(step, update.finite)
            examples += config.batch_size
            done = step + 1
            epoch_ends, save_due = done % epoch == 0, done % checkpoint_every == 0 or done == total

            if step % LOG_EVERY == 0 or epoch_ends or save_due or stop.received:
                total_skipped, in_a_row, last = skipped.counts()  # synchronises, for the clock
                if in_a_row >= config.max_skipped:
                    raise FloatingPointError(
                        f"updates {last - in_a_row + 1} to {last} skipped, loss or gradient not "
                        f"finite: {in_a_row} in a row (--max-skipped {config.max_skipped})"
                    )
                speed = examples / (time.perf_counter() - clock)
                log.write(
                    step, loss=float(update.loss), learning_rate=rate,
                    gradient_norm=float(update.gradient_norm), skipped=total_skipped,
                    examples_per_second=speed,
                )  # fmt: skip
                bar.set_postfix_str(f"loss {float(update.loss):.3f}, {speed:,.1f} examples/s")
                if epoch_ends:
                    predictions = predict(model, setup.validation, config, task)
                    found = scores.evaluate(task, data.validation, predictions)
                    log.write(done, **{f"validation {name}": x for name, x in found.items()})
                    tqdm.write(f"epoch {done // epoch}: {listed(found)}")
                    score = found[task.scores[0]]
                    if best_score is None or score > best_score:
                        best_epoch, best_score = done // epoch, score
                        model.save_pretrained(out / "model")
                        tokenizer.save(out / "model")
                if save_due or stop.received:
                    save(done)
                    if stop.received and done < total:
                        writer.wait()
                        bar.close()
                        stop.end_process(done, goes_on or out)
                examples, clock = 0, time.perf_counter()
        writer.wait()

        best = type(model).from_pretrained(out / "model").to(config.device)
        seen = chosen(list(zip(data.train, setup.train, strict=True)), len(setup.validation))
        seen_examples, seen_encoded = zip(*seen, strict=True)
        fitted = predict(best, seen_encoded, config, task)
        predictions = predict(best, setup.validation, config, task)
        labels = np.array([example.label for example in setup.validation])
        plot_predictions(labels, predictions, task.labels, out / "predictions.png")
        result = {
            "best epoch": best_epoch,
            "training": scores.evaluate(task, seen_examples, fitted),
            "validation": scores.evaluate(task, data.validation, predictions),
            "baseline": scores.baseline(task, data.train, data.validation),
        }
        submitted = data.validation
        if data.test:
            submitted, predictions = data.test, predict(best, setup.test, config, task)
            result["test"] = scores.evaluate(task, data.test, predictions)
    submissions.write(out / "predictions", task, submitted, predictions)
    run.write_json(out / run.RESULT, result)
    print_result(result)
    if stop.received and config.seeds > 1:  # too late for this run, not for those after it
        stop.end_process(total, goes_on or out)
    return result


def micro_losses(
    model: GPT1TaskModel, batch: Batch, seeds: Tensor, config: FinetuneConfig, task: Task
) -> Iterator[Tensor]:
    """The paper's L3 = L2 + λ · L1 of a batch in host memory, micro-batch by micro-batch."""
    with weights_in(model, config.dtype):
        for first, part in batch.split(config.accumulate):
            part = part.to(config.device)
            with autocast(config.device, config.dtype):
                output = model(
                    part.input_ids, part.extract, part.members,
                    part.lm_targets if config.lm_weight > 0 else None, part.lm_weight,
                    dropout_seeds=seeds, first_sequence=first,
                )  # fmt: skip
            loss = task_loss(output.logits, part.labels, task) / len(batch.members)
            if config.lm_weight > 0:
                loss = loss + config.lm_weight * output.lm_loss
            yield loss


def task_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """The sum over the examples: of −log p(label), or of squared errors."""
    if task.regression:
        return mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
    return cross_entropy(logits.float(), labels, reduction="sum")


@torch.no_grad()
def predict(
    model: GPT1TaskModel, examples: Sequence[Encoded], config: FinetuneConfig, task: Task
) -> np.ndarray:
    """The likeliest class or answer of each example, or its score: (examples,)."""
    was_training = model.training
    model.eval()
    predictions = np.empty(len(examples), dtype=np.float64 if task.regression else np.int64)
    for numbers in by_length(examples, config.batch_size):
        batch = collate([examples[i] for i in numbers]).to(config.device)
        with autocast(config.device, config.dtype):
            logits = model(batch.input_ids, batch.extract, batch.members).logits.float()
        found = logits.squeeze(-1) if task.regression else logits.argmax(-1)
        predictions[numbers] = found.cpu().numpy()
    model.train(was_training)
    return predictions


def prepare(config: FinetuneConfig) -> Setup:
    """Reads the task, the tokenizer and the pre-trained model, and encodes the examples."""
    if config.task == CUSTOM:
        task, folder = custom_task(config.custom), Path()
    else:
        task, folder = TASKS[config.task], config.data_dir
    data = load(task, folder, skip_bad_rows=config.skip_bad_rows)
    for note in data.notes:
        print(note)
    if config.train_examples is not None:
        data = replace(data, train=chosen(data.train, config.train_examples))

    digest = hashlib.sha256(repr((task.kind, task.labels)).encode())
    pretrained = None
    if config.model is not None:
        model = model_folder(config.model)
        tokenizer = Tokenizer.open(model)
        pretrained = backbone_at(model).bare.from_pretrained(model)
        shape = pretrained.config
        if shape.vocab_size not in (tokenizer.vocab_size, tokenizer.vocab_size + N_SPECIALS):
            raise ValueError(
                f"--model: {model} has {shape.vocab_size} tokens, expected the "
                f"{tokenizer.vocab_size} of its tokenizer, and maybe {N_SPECIALS} special ones"
            )
        with (model / WEIGHTS).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        shape = GPT1Config.preset(config.preset)
        if config.tokenizer is not None:
            tokenizer = Tokenizer.open(config.tokenizer)
        else:
            texts = (t for example in data.train for t in (*example.texts, *example.answers))
            tokenizer = Tokenizer.train(texts, shape.vocab_size, at_most=True)

    splits = []
    for examples in (data.train, data.validation, data.test):
        rows = tqdm(examples, desc="tokenising", unit="example", delay=1, leave=False)
        splits.append([
            encode(example, task.kind, tokenizer, shape.n_positions, config.truncation)
            for example in rows
        ])  # fmt: skip
    for encoded in chain(*splits[:2]):  # validation chooses the best epoch
        digest.update(repr(encoded.label).encode())
        for sequence in encoded.sequences:
            digest.update(sequence.tobytes())
    return Setup(task, data, tokenizer, shape, pretrained, digest.hexdigest(), *splits)


def make_model(config: FinetuneConfig, setup: Setup) -> GPT1TaskModel:
    """A new model, drawn from torch's generator, with what --n-transfer takes from the old one."""
    shape, task = setup.shape, setup.task
    extra = {k: v for k, v in shape.extra.items() if k not in ("id2label", "label2id")}
    extra[HEAD_KEY] = "choice" if task.kind == "choice" else "sum"
    if task.kind != "choice" and task.labels:
        extra["id2label"] = {str(number): label for number, label in enumerate(task.labels)}
    model = backbone_of(shape).task_model(
        replace(
            shape, vocab_size=setup.tokenizer.vocab_size + N_SPECIALS, num_labels=task.outputs,
            summary_first_dropout=config.classifier_dropout, extra=extra,
        )
    )  # fmt: skip
    blocks = shape.n_layer if config.n_transfer is None else config.n_transfer
    if blocks > shape.n_layer:
        raise ValueError(f"--n-transfer: {blocks}, expected at most the model's {shape.n_layer}")
    if setup.pretrained is not None and blocks >= 0:
        transfer(setup.pretrained, model.transformer, blocks)
    return model


@torch.no_grad()
def transfer(pretrained: GPT1Model, model: GPT1Model, blocks: int) -> None:
    """Copies both tables and the first blocks; the model may have more tokens at the end."""
    table = pretrained.tokens_embed.weight
    model.tokens_embed.weight[: len(table)] = table
    model.positions_embed.weight.copy_(pretrained.positions_embed.weight)
    for block, source in zip(model.h[:blocks], pretrained.h, strict=False):
        block.load_state_dict(source.state_dict())


def listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def print_result(result: dict) -> None:
    for name in ("training", "validation", "baseline", "test"):
        if result.get(name):
            print(f"{name}: {listed(result[name])}")


if __name__ == "__main__":
    cli.run(main, FinetuneConfig)
