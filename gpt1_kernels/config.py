"""The shape of a model: Hugging Face's keys, the paper's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "gpt1": {},
    "mini": {"vocab_size": 4096, "n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4},
}

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names that `transformers` reads; a configuration has them as attributes too."""

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class GPT1Config:
    """Configuration of all GPT-1 models; the defaults are the paper's (Radford et al. 2018).

    Keys of a `config.json` that are not fields here are kept in `extra` and written back.

    Raises:
        ValueError: a value out of range, an activation other than the tanh-GELU, or an unknown
            problem_type.
    """

    vocab_size: int = 40478
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    afn: str = "gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_first_dropout: float = 0.1
    num_labels: int = 2
    problem_type: str | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"vocab_size": 1, "n_positions": 1, "n_embd": 1, "n_head": 1, "n_layer": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name}: {value!r}, expected an integer of at least {minimum}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd}, expected a multiple of n_head {self.n_head}")
        if self.afn != "gelu":
            raise ValueError(f"afn: {self.afn!r}, expected 'gelu', GPT-1's activation")
        if self.problem_type not in (None, *PROBLEMS):
            raise ValueError(f"problem_type: {self.problem_type!r}, expected None or {PROBLEMS}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a probability in [0, 1]")

    def __getattr__(self, name: str) -> Any:
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(ALIASES.get(name, name), value)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPT1Config:
        """A named shape: "gpt1" is the paper's, "mini" trains on a CPU."""
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT1Config:
        """From the content of a `config.json`, Hugging Face's or ours."""
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {ALIASES.get(k, k): v for k, v in values.items()}
        if "id2label" in values:
            values.setdefault("num_labels", len(values["id2label"]))
        extra = {k: v for k, v in values.items() if k not in known}
        return cls(**{k: v for k, v in values.items() if k in known}, extra=extra)

    def get_text_config(self, **_: Any) -> GPT1Config:
        """Itself: the Trainer of `transformers` sets special tokens on what this returns."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` opens too."""
        values = asdict(self)
        extra = values.pop("extra")
        return {"model_type": "openai-gpt", **extra, **values}
