"""Other people's GPT-1 files to a folder of ours: `python -m gpt1_kernels.convert SOURCE TARGET`.

The source is OpenAI's release of 2018 (github.com/openai/finetune-transformer-lm, `model/`) or a
Hugging Face folder. The release holds one flat fp32 array, cut into ten files. `params_shapes.json`
has the shapes in its order, which is that of `_layout`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn

from gpt1_kernels.config import GPT1Config
from gpt1_kernels.heads import (
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
)
from gpt1_kernels.model import GPT1Model
from gpt1_kernels.pretrained import WEIGHTS, PretrainedMixin, config_values
from gpt1_kernels.task_model import GPT1TaskModel

SHAPES, PARTS, ARRAYS_PER_LAYER = "params_shapes.json", 10, 12
TOKENIZER = "tokenizer.json"
VOCABULARIES = (("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt"))
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
HEAD_SIZE = 64


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")],
    n_head: int | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json`, and the files of the tokenizer.

    These are `tokenizer.json`, `vocab.json` and `merges.txt`, where the source has a vocabulary.

    Args:
        source: OpenAI's release (params_shapes.json, params_0.npy ... params_9.npy) or a Hugging
            Face folder (model.safetensors, config.json); a vocabulary beside them is converted too.
        target: a new or empty folder.
        n_head: attention heads. Default: the configuration's, or C / 64 for OpenAI's release.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: the target holds something already.
        ValueError: a pickle, or a file whose content does not fit; the message names it.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target}: expected a new or empty folder")
    if (source / SHAPES).is_file():
        model = read_release(source, n_head)
    else:
        model = read_hugging_face(source, n_head)
    tokenizer = read_tokenizer(source, model.config.vocab_size)
    model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save(str(target / TOKENIZER))
        tokenizer.model.save(str(target))


def read_release(folder: Path, n_head: int | None = None) -> GPT1LMHeadModel:
    """The model in OpenAI's files; see `convert`."""
    file = folder / SHAPES
    shapes = _shapes(file)
    (n_positions, width), (vocab_size, _) = shapes[:2]
    if n_head is None and width % HEAD_SIZE:
        raise ValueError(
            f"n_head: not given, and width {width} in {file} is no multiple of {HEAD_SIZE}"
        )
    config = GPT1Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=width,
        n_layer=(len(shapes) - 2) // ARRAYS_PER_LAYER,
        n_head=width // HEAD_SIZE if n_head is None else n_head,
    )
    layout = _layout(config)
    for i, (shape, (name, expected)) in enumerate(zip(shapes, layout.items(), strict=True)):
        if shape != expected:
            raise ValueError(f"{file}: shape {i}, {name}, is {shape}, expected {expected}")
    parts = [_array(folder / f"params_{i}.npy") for i in range(PARTS)]
    sizes = [math.prod(shape) for shape in shapes]
    found = sum(map(len, parts))
    if found != sum(sizes):
        counts = ", ".join(f"params_{i} {len(part)}" for i, part in enumerate(parts))
        raise ValueError(
            f"{folder}/params_*.npy: {found} elements ({counts}), "
            f"expected the {sum(sizes)} of {SHAPES}"
        )
    model = GPT1LMHeadModel(config)
    arrays = torch.from_numpy(np.concatenate(parts)).split(sizes)
    model.load_pretrained_state(
        {name: a.view(shape[-2:]) for name, a, shape in zip(layout, arrays, shapes, strict=True)}
    )
    return model


def read_hugging_face(folder: Path, n_head: int | None = None) -> nn.Module:
    """The model in a Hugging Face folder, with the head that its weights have; see `convert`."""
    if not (folder / WEIGHTS).is_file():
        pickles = [file for pattern in PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{pickles[0]}: a pickle, which can run any code, is not opened; expected "
                f"{WEIGHTS} (or {SHAPES} for OpenAI's release)"
            )
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {SHAPES} in it")
    overrides = {} if n_head is None else {"n_head": n_head}
    return _model_class(folder).from_pretrained(folder, **overrides)


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """A folder's `tokenizer.json`, or one made of its vocabulary and merges; None without.

    Raises:
        FileNotFoundError: one of vocabulary and merges without the other.
        ValueError: a damaged file, or more entries than the model's.
    """
    if (folder / TOKENIZER).is_file():
        file = folder / TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # what `tokenizers` raises has no narrower type
            raise ValueError(f"{file}: not a tokenizer, {error}") from None
    else:
        pairs = [[folder / name for name in pair] for pair in VOCABULARIES]
        present = [pair for pair in pairs if any(file.is_file() for file in pair)]
        if not present:
            return None
        file, merges = present[0]
        tokenizer = _bpe(file, merges)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{file}: {tokenizer.get_vocab_size()} entries, expected at most the model's "
            f"{vocab_size}"
        )
    return tokenizer


def _bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-1's tokenizer as `transformers` has it: BERT's clean-up, then BPE with `</w>`."""
    ids = _json(vocabulary)
    fits = isinstance(ids, dict) and all(type(i) is int for i in ids.values())
    if not fits or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{vocabulary}: expected an object of tokens with the ids 0, 1, 2, ...")
    try:
        lines = _existing(merges).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges}: not UTF-8, {error}") from None
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    try:
        model = models.BPE(ids, pairs, unk_token="<unk>", end_of_word_suffix="</w>")
    except Exception as error:  # what `tokenizers` raises has no narrower type
        raise ValueError(f"{merges}: does not fit {vocabulary.name}, {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _layout(config: GPT1Config) -> dict[str, list[int]]:
    """Names and shapes of the released arrays; a linear layer is a convolution of width 1 there."""
    c = config.n_embd
    layer = {
        "attn.c_attn.weight": [1, c, 3 * c],
        "attn.c_attn.bias": [3 * c],
        "attn.c_proj.weight": [1, c, c],
        "attn.c_proj.bias": [c],
        "ln_1.weight": [c],
        "ln_1.bias": [c],
        "mlp.c_fc.weight": [1, c, 4 * c],
        "mlp.c_fc.bias": [4 * c],
        "mlp.c_proj.weight": [1, 4 * c, c],
        "mlp.c_proj.bias": [c],
        "ln_2.weight": [c],
        "ln_2.bias": [c],
    }
    return {
        "positions_embed.weight": [config.n_positions, c],
        "tokens_embed.weight": [config.vocab_size, c],
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()},
    }


def _shapes(file: Path) -> list[list[int]]:
    """Two tables' shapes and those of whole layers."""
    shapes = _json(file)
    fits = (
        isinstance(shapes, list)
        and all(isinstance(shape, list) for shape in shapes)
        and all(type(n) is int and n > 0 for shape in shapes for n in shape)
        and [len(shape) for shape in shapes[:2]] == [2, 2]
        and (len(shapes) - 2) % ARRAYS_PER_LAYER == 0
    )
    if not fits:
        raise ValueError(
            f"{file}: expected a list of shapes: two tables', then {ARRAYS_PER_LAYER} a layer"
        )
    return shapes


def _array(file: Path) -> np.ndarray:
    """A flat fp32 array."""
    try:
        array = np.load(_existing(file), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a whole .npy file, {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 1:
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{file}: {what}, expected one axis of floating-point numbers")
    return array.astype(np.float32, copy=False)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


def _json(file: Path) -> Any:
    try:
        return json.loads(_existing(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON, {error}") from None


def _model_class(folder: Path) -> type[PretrainedMixin]:
    """The class of the weights: by their heads, then by the configuration."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            heads = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a whole safetensors file, {error}") from None
    if "score" in heads:
        return GPT1ForSequenceClassification
    if "multiple_choice_head" in heads:
        return GPT1DoubleHeadsModel
    if "classifier" in heads:
        return GPT1TaskModel
    bare = config_values(folder).get("architectures") == ["OpenAIGPTModel"]
    return GPT1Model if bare else GPT1LMHeadModel


if __name__ == "__main__":
    try:
        tyro.cli(convert, prog="python -m gpt1_kernels.convert")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
