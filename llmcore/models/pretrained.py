"""Models in folders of the Hugging Face form: config.json and safetensors, read and written without `transformers`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.checkpoints import CheckpointError, TensorFiles, read_json, write_tensor_files
from llmcore.layers import RotaryEmbedding
from llmcore.models.build import Model
from llmcore.models.config import ModelConfig
from llmcore.models.families import FAMILIES, Family, family_of
from llmcore.models.meta import meta_model

MAX_COUNT = 1 << 14  # of layers, and of experts in one
_COUNTS = ("num_hidden_layers", "n_layer", "num_local_experts", "num_experts", "n_routed_experts")
_TABLE_BYTES = 256 << 20  # of rotary tables that the smallest model may have: 2^19 positions of 128 features
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: str | Path, names: Collection[str] | None = None) -> tuple[Family, ModelConfig]:
    """The family and configuration of a folder's config.json; with the `names` of its tensors, what they tell of parts
    that config.json leaves open.

    Raises:
        CheckpointError: for an unknown model_type, a setting that the family does not have here, or a config.json that
            is missing or no JSON object.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    family = FAMILIES.get(values.get("model_type"))
    if family is None:
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}; accepted: {', '.join(FAMILIES)}")
    for name in _COUNTS:
        if isinstance(value := values.get(name), int) and value > MAX_COUNT:
            raise CheckpointError(f"{path}: {name} is {value}; accepted: up to {MAX_COUNT}")
    try:
        config = family.config(values)
        return family, config if names is None else family.fit(config, _names(family, names))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_pretrained(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Model:
    """The model of a Hugging Face folder, in evaluation mode.

    Args:
        folder: holds config.json and model.safetensors, or its shards with their index.
        dtype: of the weights; None: as they are stored.
        device: where the model goes.

    Raises:
        CheckpointError: naming the file and what is wrong: an unknown model_type, an unsupported setting, a shard or
            tensor that is missing, unreadable, of another shape than config.json says, or without a place in the model.
    """
    folder = Path(folder)
    family, _ = read_config(folder)  # its errors first
    files = TensorFiles(folder)
    _, config = read_config(folder, list(files))
    try:
        model = meta_model(config, len(files))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    with torch.no_grad():
        tensors = dict(_ours(family, config, files, model.state_dict()))
    for name, tensor in tensors.items():
        wanted = tensor.dtype if name.endswith("expert_bias") or dtype is None else dtype
        tensors[name] = tensor.to(device, wanted)
    model.load_state_dict(tensors, assign=True, strict=True)
    build_rope_tables(model, folder / "config.json", sum(tensor.nbytes for tensor in tensors.values()), device)
    return model.eval()


def build_rope_tables(model: Model, source: str | Path, num_bytes: int, device: torch.device | str) -> None:
    """Makes the tables that are in no file.

    Raises:
        CheckpointError: naming `source`, when by its max_positions they would take more memory than a model with
            `num_bytes` of weights can justify.
    """
    tables = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    needed = sum(8 * table.max_positions * (table.rotary_dim // 2) for table in tables)
    if needed > max(_TABLE_BYTES, 4 * num_bytes):
        raise CheckpointError(
            f"{source}: max_positions is {model.config.max_positions}: rotary tables of {needed} bytes beside "
            f"{num_bytes} bytes of weights"
        )
    try:
        for table in tables:
            table.build_tables(device)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: rotary tables of {model.config.rope_scaling}: {error}") from None


def _ours(
    family: Family, config: ModelConfig, files: TensorFiles, wanted: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors out of theirs, checked against the shapes that the configuration asks for."""
    name_of = _names(family, files)
    used = set()
    for rule in family.rules(config):
        if rule.copy:
            used.update(rule.theirs)
            continue
        if missing := [name for name in rule.theirs if name not in name_of]:
            raise CheckpointError(f"{files.folder}: tensor {missing[0]!r} is missing")
        parts = [files[name_of[name]] for name in rule.theirs]
        used.update(rule.theirs)
        source = files.source(name_of[rule.theirs[0]])
        if len({part.dtype for part in parts}) > 1 or not parts[0].dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: tensor {rule.theirs[0]!r} is {parts[0].dtype}; accepted: {', '.join(DTYPES)}, the same for "
                "all parts of a matrix"
            )
        try:
            tensor = rule.join(parts)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{source}: tensor {rule.theirs[0]!r}: {error}") from None
        if tensor.shape != wanted[rule.ours].shape:
            raise CheckpointError(
                f"{source}: tensor {rule.theirs[0]!r} gives shape {tuple(tensor.shape)}; config.json asks for "
                f"{tuple(wanted[rule.ours].shape)}"
            )
        yield rule.ours, tensor
    for name in name_of:
        tied = config.tied_embeddings and name == "lm_head.weight"
        if name not in used and not tied and not name.endswith(family.ignored):
            raise CheckpointError(f"{files.source(name_of[name])}: tensor {name!r} has no place in this model")


def _names(family: Family, files: Collection[str] | TensorFiles) -> dict[str, str]:
    """Names as the family's rules write them -> names in the files, which may lack the prefix of the body (a model
    saved without its head)."""
    body = family.body or ""
    if any(name.startswith(body) for name in files):
        body = ""
    result = {}
    for name in files:
        written = name if name.startswith(family.heads) else body + name
        for old, new in family.renamed.items():
            written = written.removesuffix(old) + new if written.endswith(old) else written
        result[written] = name
    return result


def save_pretrained(model: Model, folder: str | Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Writes the model as `transformers` loads it; `load_pretrained` gives every weight back bit for bit.

    Raises:
        ValueError: when no family of `transformers` describes the model, or its weights are quantised.
    """
    folder = Path(folder)
    if model.is_quantized:
        raise ValueError("the model is quantised; save_pretrained writes floating-point weights")
    family = family_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    dtype = str(model.dtype).removeprefix("torch.")
    values = family.config_json(model.config) | {"dtype": dtype, "torch_dtype": dtype}
    write_tensor_files(folder, _theirs(family, model.config, state), max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _theirs(family: Family, config: ModelConfig, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    # a body alone is saved under the names that its class has without a head
    bare = family.body if config.head == "none" and family.body else ""
    for rule in family.rules(config):
        names = [name.removeprefix(bare) for name in rule.theirs]
        tensor = state[rule.ours].detach()
        # a copy has memory of its own: safetensors refuses tensors that share it
        yield from zip(names, rule.split(tensor.clone() if rule.copy else tensor), strict=True)
