"""Recipes: what a run is, as TOML with every key checked.

An unknown key, a wrong type or a value out of range raises :class:`RecipeError` naming the key and what is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from llmcore.inference.sampling import check_sampling
from llmcore.models import PRESETS, ModelConfig
from llmcore.tokenizers.train import KINDS
from llmcore.training.loop import TrainConfig
from llmcore.training.optim import OptimConfig
from llmcore.training.schedules import ScheduleConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that can't be read. Names the key."""


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer to train on the corpus, or with ``path`` one that is there (a folder or a ``tokenizer.json``)."""

    kind: str = "bpe"  # bpe | unigram | word | byte
    vocab_size: int = 4096  # not used for byte
    path: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer.kind is {self.kind!r}{nearest(self.kind, KINDS)}")


@dataclass(frozen=True)
class SourceConfig:
    """A part of the corpus. ``path`` is a file, a folder, or ``stdlib`` (the sources of the running Python's library).

    ``format``: text | jsonl | parquet | auto (each file by its suffix). ``weight`` is its share of the tokens, relative
    to the others.
    """

    path: str
    format: str = "auto"
    text_field: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in ("auto", "text", "jsonl", "parquet"):
            accepted = "accepted are 'auto', 'text', 'jsonl' and 'parquet'"
            raise ValueError(f"data.sources: format is {self.format!r}; {accepted}")
        if not self.path:
            raise ValueError("data.sources: path is empty; accepted is a file, a folder or 'stdlib'")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"data.sources: weight is {self.weight}; accepted is a finite number above 0")


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the shape of a micro-batch: ``batch_rows`` rows of ``row_len`` tokens."""

    sources: list[SourceConfig]
    row_len: int = 256
    batch_rows: int = 8
    validation_fraction: float = 0.02
    eval_batches: int = 32  # held-out micro-batches per evaluation; 0 = all
    folder: str = ""  # where the tokenised corpus is kept; "" = in the run folder

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; at least one source is needed")
        for name, least in (("row_len", 2), ("batch_rows", 1), ("eval_batches", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; accepted is {least} or more")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction is {self.validation_fraction}; accepted is above 0, below 1")


@dataclass(frozen=True)
class SampleConfig:
    """What is generated for the report when training is over."""

    prompts: list[str] = field(default_factory=list)
    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sample.max_tokens is {self.max_tokens}; accepted is 1 or more")
        try:
            check_sampling(self.temperature, top_p=self.top_p)
        except ValueError as error:
            raise ValueError(f"sample.{error}") from None


@dataclass(frozen=True)
class Recipe:
    """A pretraining run. ``model`` holds ``preset``, ``size`` and any field of ``ModelConfig`` but ``vocab_size``."""

    model: dict[str, Any]
    data: DataConfig
    name: str = "run"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        config = self.model_config(vocab_size=512)
        if config.position_limit is not None and self.data.row_len > config.max_positions:
            raise ValueError(
                f"data.row_len is {self.data.row_len}; accepted is at most model.max_positions = {config.max_positions}"
            )

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The configuration of the recipe's model for a tokenizer of ``vocab_size`` tokens."""
        values = dict(self.model)
        preset, size = values.pop("preset", "llama"), values.pop("size", "mini")
        if preset not in PRESETS:
            raise ValueError(f"model.preset is {preset!r}{nearest(str(preset), PRESETS)}")
        if "vocab_size" in values:
            raise ValueError("model.vocab_size follows from the tokenizer; set tokenizer.vocab_size")
        try:
            return PRESETS[preset](size, **values, vocab_size=vocab_size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"[model] {error}") from None


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The end of an error about ``name``: the most similar of ``accepted``, or all of them."""
    names = sorted(accepted)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; accepted are {', '.join(names)}"


def _instead(key: str, accepted: Iterable[str]) -> str:
    """The end of an error about the unknown ``key``: the key of that name in another section, or :func:`nearest`."""
    name = key.rpartition(".")[2]
    sections = {s: c for s, c in get_type_hints(Recipe).items() if dataclasses.is_dataclass(c)} | {"model": ModelConfig}
    elsewhere = [f"{section}.{name}" for section, cls in sections.items() if name in get_type_hints(cls)]
    return nearest(key, elsewhere) if elsewhere else nearest(name, accepted)


def from_table(cls: type, table: Mapping[str, Any], at: str = "") -> Any:
    """An instance of the dataclass ``cls`` from a TOML table; ``at`` is the key of the table."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{at} is {table!r}; accepted is a table")
    hints = get_type_hints(cls)
    prefix = f"{at}." if at else ""
    for key in table:
        if key not in hints:
            raise RecipeError(f"unknown key {prefix + key!r}{_instead(prefix + key, hints)}")
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in table:
            raise RecipeError(f"{prefix + f.name!r} is missing")
    values = {key: _value(value, hints[key], prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(str(error)) from None


def _value(value: Any, hint: Any, at: str) -> Any:
    """``value`` as type ``hint`` (an int stands for a float), else an error naming both."""
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_table(hint, value, at)
    if origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and len(value) != len(inner)):
            length = f" of {len(inner)}" if origin is tuple else ""
            raise RecipeError(f"{at} is {value!r}; accepted is a list{length}")
        hints = inner * len(value) if origin is list else inner
        return origin(_value(v, h, f"{at}[{i}]") for i, (v, h) in enumerate(zip(value, hints)))
    plain = origin or hint
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise RecipeError(f"{at} is {value!r} ({type(value).__name__}); accepted: {plain.__name__}")
    return value


def parse_override(text: str) -> tuple[list[str], Any]:
    """``train.steps=100`` as (["train", "steps"], 100). The value is TOML; what is no TOML is taken as a string."""
    key, equals, value = text.partition("=")
    keys = [k.strip() for k in key.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"--set {text}: accepted is KEY=VALUE, such as train.steps=100")
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value.strip()


def apply_overrides(table: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set each ``KEY=VALUE`` in ``table`` in place. A list's items are reached by number: ``data.sources.0.path``."""
    for text in overrides:
        keys, value = parse_override(text)
        place: Any = table
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            if isinstance(place, list):
                if not key.isdigit() or int(key) >= len(place):
                    raise RecipeError(f"--set {text}: {key!r} is not the number of an item; there are {len(place)}")
                key = int(key)
            elif not isinstance(place, dict):
                raise RecipeError(f"--set {text}: {'.'.join(keys[:depth])!r} is not a table")
            if last:
                place[key] = value
            else:
                place = place[key] if isinstance(key, int) else place.setdefault(key, {})


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, or the shipped one of that name, with ``--set`` overrides applied."""
    path = Path(path)
    if not path.is_file():
        shipped = SHIPPED / (path.name if path.suffix == ".toml" else path.name + ".toml")
        if path.parent != Path(".") or not shipped.is_file():
            names = ", ".join(sorted(p.name for p in SHIPPED.glob("*.toml")))
            raise RecipeError(f"{path}: no such recipe; shipped are {names}")
        path = shipped
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    try:
        apply_overrides(table, overrides)
        return from_table(Recipe, table)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def to_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; :func:`load_recipe` gives it back."""
    table = dataclasses.asdict(recipe)
    sources = table["data"].pop("sources")
    lines = [f"name = {_toml(table.pop('name'))}"]
    for section, values in table.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    for source in sources:
        lines += ["", "[[data.sources]]", *(f"{key} = {_toml(value)}" for key, value in source.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, str):  # a JSON string is a TOML string, but for the one control character JSON leaves alone
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)  # int or float, whose Python forms are TOML's
