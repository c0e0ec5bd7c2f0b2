"""What pre-training alone teaches: `python training/zero_shot.py RUN …`, or `--help`.

The paper's heuristics (its section 5 and figure 2, right), over all checkpoints of a run:

| task | the model is asked |
|---|---|
| CoLA | whether the mean log-probability of a sentence's tokens passes a threshold |
| SST-2 | which of `positive` and `negative` is likelier after the sentence and `very` |
| RACE | which answer has the highest mean log-probability after the passage and the question |
| DPRD | which referent in place of the pronoun makes the rest of the sentence likelier |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from gpt1_kernels import GPT1LMHeadModel
from gpt1_kernels.heads import IGNORE_INDEX
from gpt1_kernels.ops import linear_cross_entropy
from training import cli, readers, run
from training.checkpoint import Checkpoint, checkpoints
from training.config import default_device, require
from training.examples import Example, RowError, chosen, load
from training.inputs import Ids, cut_longest
from training.lstm import backbone_at
from training.plots import plot_zero_shot
from training.scores import SCORES
from training.tasks import TASKS
from training.tokenizer import Tokenizer

Encode = Callable[[str], Ids]


@dataclass(frozen=True)
class ZeroShotConfig:
    """Evaluates every checkpoint of a pre-training run (keep them all with `--keep 0`)."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    cola: Path | None = None
    """Folder with CoLA's files."""
    sst2: Path | None = None
    """Folder with SST-2's files."""
    race: Path | None = None
    """Folder with RACE's files."""
    dprd: Path | None = None
    """A file of the definite pronoun resolution data: groups of five lines."""
    examples: int = 1000
    """At most so many of each task, always the same."""
    dprd_best: float = 1.0
    """Accuracy on DPRD that the plot shows as 1. The paper does not print the one that it uses."""
    out: Path | None = None
    """Where zero_shot.json and zero_shot.png go. Default: the run's folder."""
    batch_size: int = 32
    """Sequences at a time."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: a GPU where there is one."""


class Scored(NamedTuple):
    """A sequence whose tokens from `start` on are scored, given those before."""

    ids: Ids
    start: int


# The score of guessing, and of the best other model in the paper's tables 3 and 4. RACE's is an
# ensemble of nine, for the tables have no single model.
SCALE = {"cola": (0.0, 0.350), "sst2": (0.5, 0.932), "race": (0.25, 0.533), "dprd": (0.5, 1.0)}


def main(config: ZeroShotConfig) -> None:
    config = replace(config, device=str(default_device(config.device)))
    require(config, ("examples",), lambda x: x >= (1 if config.cola is None else 2),
            "at least 1, and 2 for CoLA's threshold")  # fmt: skip
    require(config, ("batch_size",), lambda x: x >= 1, "at least 1")
    require(config, ("dprd_best",), lambda x: 0.5 < x <= 1, "above 0.5, which is guessing, to 1")
    tasks = read_tasks(config)
    if not tasks:
        raise ValueError("expected at least one of --cola, --sst2, --race, --dprd")
    found = checkpoints(config.run / run.CHECKPOINTS)
    if not found:
        raise FileNotFoundError(f"{config.run}: no checkpoints, expected a run of pretrain.py")
    scale = SCALE | {"dprd": (0.5, config.dprd_best)}
    out = run.usable(config.out or config.run)
    rows = []
    for folder in found:
        try:
            step = Checkpoint.open(folder).step
            model = backbone_at(folder).language_model.from_pretrained(folder).to(config.device)
            tokenizer = Tokenizer.open(folder)
        except (OSError, ValueError) as error:  # OSError: removed by a run that goes on, --keep
            print(f"refused: {error}")
            continue
        scores = {
            name: zero_shot(name, examples, model, tokenizer, config)
            for name, examples in tasks.items()
        }
        normalised = {
            name: (score - scale[name][0]) / (scale[name][1] - scale[name][0])
            for name, score in scores.items()
        }
        rows.append({"step": step, "scores": scores, "normalised": normalised})
        print(f"update {step}: " + ", ".join(f"{name} {x:.3f}" for name, x in scores.items()))
        run.write_json(out / "zero_shot.json", rows)
    if not rows:
        raise ValueError(f"{config.run}: none of {len(found)} checkpoints can be used")
    plot_zero_shot(rows, out / "zero_shot.png")


def read_tasks(config: ZeroShotConfig) -> dict[str, dict[str, list[Example]]]:
    """By task: the examples to ask about, and for CoLA those that the threshold is chosen on.

    Without a validation file, the other tasks ask about all examples: none is trained on.
    """
    tasks = {}
    for name in ("cola", "sst2", "race"):
        if (folder := getattr(config, name)) is not None:
            data = load(TASKS[name], folder)
            everything = data.held_out and name != "cola"
            asked = data.train + data.validation if everything else data.validation
            tasks[name] = {"train": data.train, "validation": asked}
    if config.dprd is not None:
        tasks["dprd"] = {"validation": read_dprd(config.dprd)}
    return {
        name: {split: chosen(examples, config.examples) for split, examples in splits.items()}
        for name, splits in tasks.items()
    }


def read_dprd(file: Path) -> list[Example]:
    """Definite pronouns: texts are what is left and right of the pronoun, answers its referents.

    Raises:
        ValueError: a group that is not of five lines, or lacks the pronoun or the answer.
    """
    examples = []
    for _, row in readers.dprd_groups(file):
        if isinstance(row, RowError):
            raise row
        label = row["candidates"].index(row["answer"])
        examples.append(Example((row["left"], row["right"]), tuple(row["candidates"]), label))
    return examples


def cola(example: Example, encode: Encode, room: int) -> list[Scored]:
    return [Scored(*_tail(room, [], encode(example.texts[0])))]


def sst2(example: Example, encode: Encode, room: int) -> list[Scored]:
    text, very = encode(example.texts[0]), encode("very")
    return [Scored(*_tail(room, text, very, encode(x))) for x in ("negative", "positive")]


def race(example: Example, encode: Encode, room: int) -> list[Scored]:
    before = [encode(text) for text in example.texts]
    return [Scored(*_tail(room, *before, encode(answer))) for answer in example.answers]


def dprd(example: Example, encode: Encode, room: int) -> list[Scored]:
    left, right = map(encode, example.texts)
    return [Scored(*_tail(room, left, encode(referent), right)) for referent in example.answers]


HEURISTICS: dict[str, Callable[[Example, Encode, int], list[Scored]]] = {
    "cola": cola, "sst2": sst2, "race": race, "dprd": dprd,
}  # fmt: skip


def _tail(room: int, *parts: Ids) -> tuple[Ids, int]:
    """The parts in one, cut to the room where they are too long, and where the last one starts.

    The very first token is never scored: nothing comes before it.
    """
    *before, last = cut_longest(parts, room)
    ids = [token for part in before for token in part]
    return ids + last, max(1, len(ids))


def zero_shot(
    name: str,
    splits: dict[str, list[Example]],
    model: GPT1LMHeadModel,
    tokenizer: Tokenizer,
    config: ZeroShotConfig,
) -> float:
    """The score of a model that was not fine-tuned: Matthews for CoLA, else accuracy."""

    def asked(examples: Sequence[Example]) -> tuple[list[np.ndarray], np.ndarray]:
        """Mean log-probabilities of each example's candidates, and the labels."""

        def encode(text: str) -> Ids:
            return tokenizer.encode(text).tolist() if text else []

        room = model.config.n_positions
        candidates = [HEURISTICS[name](example, encode, room) for example in examples]
        flat = [candidate for its in candidates for candidate in its]
        values = mean_log_probabilities(model, flat, config.batch_size, config.device)
        ends = np.cumsum([len(its) for its in candidates])[:-1]
        return np.split(values, ends), np.array([example.label for example in examples])

    values, labels = asked(splits["validation"])
    if name != "cola":
        return SCORES["accuracy"](labels, np.array([x.argmax() for x in values]))
    train, train_labels = asked(splits["train"])
    threshold = best_threshold(np.concatenate(train), train_labels)
    return SCORES["matthews"](labels, (np.concatenate(values) > threshold).astype(int))


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest Matthews correlation: values above it are class 1."""
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    above, positive, n = np.arange(1, len(values)), labels.sum(), len(values)
    hits = labels.cumsum()[:-1]  # class 1 among the values above each cut
    # Covariance and variances of the two binary variables, times n².
    covariance = n * hits - above * positive
    spread = np.sqrt(np.maximum(above * (n - above) * positive * (n - positive), 1.0))
    cuts = np.where(values[:-1] > values[1:], covariance / spread, -np.inf)
    best = cuts.argmax()
    return float((values[best] + values[best + 1]) / 2)


@torch.no_grad()
def mean_log_probabilities(
    model: GPT1LMHeadModel, sequences: Sequence[Scored], batch_size: int, device: str
) -> np.ndarray:
    """Of the scored tokens of each sequence, in nats: (sequences,); 0 where there is none."""
    model.eval()
    result = np.zeros(len(sequences))
    order = np.argsort([len(s.ids) for s in sequences], kind="stable")
    for first in tqdm(range(0, len(order), batch_size), unit="batch", delay=2, leave=False):
        numbers = order[first : first + batch_size]
        length = max(len(sequences[i].ids) for i in numbers)
        ids = torch.zeros(len(numbers), length, dtype=torch.int64)
        targets = torch.full_like(ids, IGNORE_INDEX)
        for row, i in enumerate(numbers):  # padding is on the right, where nothing sees it
            its, start = sequences[i]
            ids[row, : len(its)] = torch.tensor(its)
            targets[row, start - 1 : max(0, len(its) - 1)] = ids[row, start : len(its)]
        ids, targets = ids.to(device), targets.to(device)
        h = model.transformer(ids).last_hidden_state
        table = model.transformer.tokens_embed.weight
        losses = linear_cross_entropy(h, table, targets, reduction="none")
        counts = (targets != IGNORE_INDEX).sum(1).clamp(min=1)
        result[numbers] = (-losses.sum(1) / counts).cpu().numpy()
    return result


if __name__ == "__main__":
    cli.run(main, ZeroShotConfig)
