"""Sentences to vectors by an encoder, in the form of the folders of sentence-transformers (arXiv 1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.checkpoints import CheckpointError, read_json
from llmcore.models import Encoder, load_pretrained, mean_pool
from llmcore.tokenizers import Tokenizer

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class TextEmbedder:
    """An encoder, its tokenizer, and how a sentence's hidden states become one vector.

    Attributes:
        pooling: "mean" of all tokens, special ones too, or the hidden state of the first, "cls".
        normalize: vectors have length 1.
        max_tokens: longer texts are cut to so many tokens, special ones counted.
    """

    model: Encoder
    tokenizer: Tokenizer
    pooling: str = "mean"
    normalize: bool = True
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; accepted: {', '.join(map(repr, POOLINGS))}")
        limit = self.model.config.position_limit
        if self.max_tokens < 1 or (limit is not None and self.max_tokens > limit):
            raise ValueError(f"max_tokens is {self.max_tokens}; accepted: 1 to max_positions = {limit}")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """(len(texts), dim) float32, on the model's device. `batch_size` texts at a time run packed, without padding,
        in the order of their lengths."""
        if isinstance(texts, str):
            raise TypeError("texts is a str; accepted: a sequence of str")
        ids = self.tokenizer.encode_wrapped(texts, self.max_tokens)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        device = self.model.lm_head_weight.device
        vectors = torch.empty(len(ids), self.model.config.dim, device=device)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            vectors[batch] = self._run([ids[i] for i in batch], device)
        return vectors

    def _run(self, ids: list[list[int]], device: torch.device) -> Tensor:
        lengths = [len(tokens) for tokens in ids]
        tokens = torch.tensor([token for row in ids for token in row], dtype=torch.int64, device=device)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        hidden = self.model(tokens, cu_seqlens=cu_seqlens, max_seqlen=max(lengths)).hidden
        pooled = mean_pool(hidden, cu_seqlens) if self.pooling == "mean" else hidden[cu_seqlens[:-1].long()]
        return F.normalize(pooled.float(), dim=-1) if self.normalize else pooled.float()


def load_embedder(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> TextEmbedder:
    """The embedder of a folder with an encoder and its tokenizer.json.

    modules.json and the config.json of its pooling, where there are such files, say how vectors are made, else they are
    means of length 1. sentence_bert_config.json may bound the tokens of a text, max_positions does in any case.

    Raises:
        CheckpointError: as `load_pretrained`; for a folder without a tokenizer; for a model that is no encoder, and a
            module or pooling that is not known here.
    """
    folder = Path(folder)
    settings = _modules(folder)
    model = load_pretrained(folder, dtype=dtype, device=device)
    if not isinstance(model, Encoder):
        raise CheckpointError(f"{folder / 'config.json'}: the model is no encoder; accepted: one such as BERT")
    try:
        tokenizer = Tokenizer.load(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no tokenizer: {error}") from None
    limit = model.config.position_limit or 512
    bounds = folder / "sentence_bert_config.json"
    asked = read_json(bounds).get("max_seq_length") if bounds.is_file() else None
    if asked is not None and (type(asked) is not int or asked < 1):
        raise CheckpointError(f"{bounds}: max_seq_length is {asked!r}; accepted: 1 or more")
    return TextEmbedder(model, tokenizer, max_tokens=min(asked or limit, limit), **settings)


def _modules(folder: Path) -> dict[str, Any]:
    """pooling and normalize, as modules.json has them."""
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    settings = {"normalize": False}
    for module in read_json(path, list):
        kind = str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else module
        if kind == "Pooling":
            settings["pooling"] = _pooling(folder, module.get("path"))
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer":
            raise CheckpointError(f"{path}: module {kind!r}; accepted: Transformer, Pooling, Normalize")
    return settings


def _pooling(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{folder / 'modules.json'}: path is {name!r}; accepted: the name of a folder beside it")
    path = folder / name / "config.json"
    values = read_json(path)
    modes = sorted(key for key, on in values.items() if key.startswith("pooling_mode_") and on)
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise CheckpointError(f"{path}: pooling by {modes}; accepted: one of {sorted(names)}")
    return names[modes[0]]
