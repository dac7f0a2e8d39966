"""LoRA adapters (arXiv 2106.09685) beside one model: each request runs with the adapter it names, or with none, and
rows of one step with different adapters run together (as in S-LoRA, arXiv 2311.03285)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.checkpoints import CheckpointError, TensorFiles, read_json
from llmcore.layers import Linear, QuantizedLinear
from llmcore.models import Transformer
from llmcore.models.families import FAMILIES, Family, Rule

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
# Settings of PEFT that change what an adapter computes, and which are not done here; the value that leaves them out.
_REFUSED = {
    "use_dora": False, "lora_bias": False, "use_qalora": False, "bias": "none", "modules_to_save": None,
    "layer_replication": None, "alora_invocation_tokens": None, "trainable_token_indices": None,
    "target_parameters": None,
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a linear layer: x a^T b^T. a: (rank, in_features); b: (out_features, rank), scaled."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter on a model's layers: what it adds to each, by the layer's name."""

    layers: Mapping[str, LowRank]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the adapter has no layers; accepted: one or more")

    @property
    def num_parameters(self) -> int:
        return sum(low.a.numel() + low.b.numel() for low in self.layers.values())


class Adapters:
    """The adapters of an engine, by name.

    Args:
        model: what they adapt. Its own weights are not touched.
        adapters: folders as PEFT writes them (`load_adapter`), or adapters.

    Raises:
        CheckpointError: for a folder that holds no adapter of this model.
        ValueError: for an adapter of another model.
    """

    def __init__(self, model: Transformer, adapters: Mapping[str, str | Path | Adapter]) -> None:
        self._found: dict[str, Adapter] = {}
        for name, adapter in adapters.items():
            self._found[name] = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, model)
            _check(model, name, self._found[name])
        self._salts = {adapter: number for number, adapter in enumerate(self._found.values(), 1)}
        self._model = model

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __getitem__(self, name: str) -> Adapter:
        return self._found[name]

    def salt(self, name: str) -> int:
        """What tells keys and values computed with this adapter from all others in the prefix cache."""
        return self._salts[self._found[name]]


@contextmanager
def applied(model: Transformer, of_row: Sequence[Adapter | None]) -> Iterator[None]:
    """Within it, `model` runs `len(of_row)` packed tokens, each with its own adapter. Rows without one get the bits
    that they would get otherwise: every layer forms its own product for all rows first, and then each adapter's is
    added to its rows."""
    rows_of: dict[Adapter, list[int]] = {}
    for row, adapter in enumerate(of_row):
        if adapter is not None:
            rows_of.setdefault(adapter, []).append(row)
    added: dict[str, list[tuple[LowRank, Tensor | None]]] = {}
    for adapter, rows in rows_of.items():
        index = None if len(rows) == len(of_row) else torch.tensor(rows, device=model.device)
        for name, low in adapter.layers.items():
            added.setdefault(name, []).append((low, index))
    handles = [
        model.get_submodule(name).register_forward_hook(partial(_add, parts)) for name, parts in added.items()
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(parts: list[tuple[LowRank, Tensor | None]], layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    (x,) = inputs
    for low, rows in parts:
        delta = ops.linear(ops.linear(x if rows is None else x[rows], low.a), low.b)
        output = output + delta if rows is None else output.index_add(0, rows, delta)
    return output


# ---- from PEFT's files


def load_adapter(folder: str | Path, model: Transformer) -> Adapter:
    """An adapter that PEFT saved, for `model`: adapter_config.json and adapter_model.safetensors.

    Its matrices are joined where the model's are (queries, keys and values are one, and so are gate and up). Layers
    that can be adapted: those of attention and of dense and shared feed-forward layers.

    Raises:
        CheckpointError: naming the file and what is wrong: another method than LoRA, a setting that is not done here
            (DoRA, biases, whole modules beside the low-rank ones), a tensor that has no place in the model, lacks its
            other half, or is of another rank or shape than the rest says.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; accepted: 'LORA'")
    for name, plain in _REFUSED.items():
        if config.get(name) not in (plain, None, False) and config[name] != []:
            raise CheckpointError(f"{folder / CONFIG}: {name} is {config[name]!r}; accepted: {plain!r}")
    files = TensorFiles(folder, TENSORS)
    pairs = _pairs(files)
    rules = _rules(model, list(pairs), folder / TENSORS)
    layers = {}
    for rule in rules:
        parts = {
            i: _part(files, pairs[name], name, config, folder)
            for i, theirs in enumerate(rule.theirs)
            if (name := theirs.removesuffix(".weight")) in pairs
        }
        if parts:
            name = rule.ours.removesuffix(".weight")
            layers[name] = _joined(model, rule, name, parts, folder / TENSORS)
    if not layers:
        raise CheckpointError(f"{folder / TENSORS}: holds no tensors")
    return Adapter(layers)


def _pairs(files: TensorFiles) -> dict[str, str]:
    """Names of adapted modules as the model's own files have them -> as these files do."""
    modules: dict[str, str] = {}
    for name in files:
        side = next((side for side in _SIDES if name.endswith(side)), None)
        if side is None or not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{files.source(name)}: tensor {name!r}; accepted: {_PREFIX}MODULE{_SIDES[0]} and {_SIDES[1]}"
            )
        stem = name.removesuffix(side)
        for other in _SIDES:
            if stem + other not in files:
                raise CheckpointError(f"{files.source(name)}: tensor {stem + other!r} is missing beside {name!r}")
        modules[stem.removeprefix(_PREFIX)] = stem
    return modules


def _rules(model: Transformer, names: Collection[str], source: Path) -> list[Rule]:
    """The rules of the family whose names these are; those of layers that can be adapted."""
    missing = None
    for family in FAMILIES.values():
        if not family.fits(model.config):
            continue
        rules = [rule for rule in family.rules(model.config) if _can_adapt(model, rule)]
        known = {theirs.removesuffix(".weight") for rule in rules for theirs in rule.theirs}
        lacking = [name for name in names if name not in known]
        if not lacking:
            return rules
        missing = missing or (lacking[0], family)
    if missing is None:
        raise CheckpointError(f"{source}: no family of transformers describes this model, so its layers have no names")
    raise CheckpointError(f"{source}: {missing[0]!r} is no layer of this model that can be adapted; {_known(*missing)}")


def _known(name: str, family: Family) -> str:
    return f"as {family.model_type}, its attention and its dense feed-forward layers can be"


def _can_adapt(model: Transformer, rule: Rule) -> bool:
    """Whether the rule is of a weight whose layer is called as such: not the output matrix, routers, experts, or the
    matrix that latent attention takes apart."""
    name = rule.ours.removesuffix(".weight")
    if rule.ours == name or not name.startswith("blocks.") or name.endswith("attention.kv_b"):
        return False
    try:
        return isinstance(model.get_submodule(name), (Linear, QuantizedLinear))
    except AttributeError:
        return False


def _part(files: TensorFiles, stem: str, name: str, config: Mapping[str, Any], folder: Path) -> LowRank:
    """One of their matrices, b scaled."""
    a, b = (files[stem + side].float() for side in _SIDES)
    rank = _setting(config, "rank_pattern", "r", name, folder)
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        raise CheckpointError(
            f"{folder / TENSORS}: {name!r} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; accepted with "
            f"r = {rank}: ({rank}, in_features) and (out_features, {rank})"
        )
    alpha = _setting(config, "alpha_pattern", "lora_alpha", name, folder)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)  # rank-stabilised: arXiv 2312.03732
    return LowRank(a, b * scale)


def _setting(config: Mapping[str, Any], patterns: str, default: str, name: str, folder: Path) -> float:
    """A number of adapter_config.json: that of the pattern which names this module, or the one for all."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict) or any(not key.replace(".", "").replace("_", "").isalnum() for key in given):
        raise CheckpointError(f"{folder / CONFIG}: {patterns} is {given!r}; accepted: ends of module names and numbers")
    found = [value for key, value in given.items() if f".{name}".endswith(f".{key}")]
    value = found[0] if found else config.get(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise CheckpointError(f"{folder / CONFIG}: {default} of {name!r} is {value!r}; accepted: a number above 0")
    return value


def _joined(model: Transformer, rule: Rule, name: str, parts: Mapping[int, LowRank], source: Path) -> LowRank:
    """Parts of one of our matrices as one: their `a` below one another, and each `b` in the rows of its part."""
    layer = model.get_submodule(name)
    rows = [part.flatten() for part in rule.split(torch.arange(layer.out_features)[:, None])]
    rank = sum(len(low.a) for low in parts.values())
    b, begin = torch.zeros(layer.out_features, rank), 0
    for i, low in parts.items():
        if low.a.shape[1] != layer.in_features or len(low.b) != len(rows[i]):
            raise CheckpointError(
                f"{source}: {rule.theirs[i].removesuffix('.weight')!r} has lora_A {tuple(low.a.shape)} and lora_B "
                f"{tuple(low.b.shape)}; the model's layer is ({len(rows[i])}, {layer.in_features})"
            )
        b[rows[i], begin : begin + len(low.a)] = low.b
        begin += len(low.a)
    a = torch.cat([low.a for low in parts.values()])
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise CheckpointError(f"{source}: {name!r} holds NaN or infinity; accepted: finite numbers")
    return LowRank(a.to(model.device, model.dtype), b.to(model.device, model.dtype))


def _check(model: Transformer, name: str, adapter: Adapter) -> None:
    for layer, low in adapter.layers.items():
        try:
            module = model.get_submodule(layer)
            wanted = (module.out_features, module.in_features)
        except AttributeError:
            raise ValueError(f"adapter {name!r} adapts {layer!r}, which is no linear layer of this model") from None
        got = (len(low.b), low.a.shape[1])
        if got != wanted or low.b.shape[1] != len(low.a):
            raise ValueError(f"adapter {name!r} adapts {layer!r} of {got[0]} x {got[1]}; the model's is {wanted}")
        if low.a.dtype != model.dtype or low.a.device != model.device:
            raise ValueError(f"adapter {name!r} is {low.a.dtype} on {low.a.device}; the model is {model.dtype}")
