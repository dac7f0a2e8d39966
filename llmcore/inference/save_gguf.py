"""A model and its tokenizer as one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from llmcore.checkpoints.gguf import GGUFFile
from llmcore.checkpoints.gguf_write import WRITABLE, gguf_format, write_gguf
from llmcore.models import Transformer
from llmcore.models.gguf import gguf_config
from llmcore.models.gguf_export import gguf_metadata, gguf_tensors, same_for_inference
from llmcore.tokenizers import Tokenizer
from llmcore.tokenizers.gguf_export import tokenizer_to_gguf


def save_gguf(
    model: Transformer,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    format: str = "f16",
    stop_ids: Collection[int] = (),
) -> None:
    """Writes a GGUF file that llama.cpp loads too; whole or not at all.

    Args:
        format: "f16", "bf16", "q8_0" or "q4_0": of the matrices. What is small stays float32 (see `gguf_format`).
        stop_ids: what ends a text beside the tokenizer's EOS.

    Raises:
        ValueError: for another format, or a model or tokenizer that the form has no words for.
        ImportError: without the package `gguf`.
    """
    if format not in WRITABLE:
        raise ValueError(f"format is {format!r}; accepted: {', '.join(map(repr, WRITABLE))}")
    path, tied = Path(path), model.config.tied_embeddings
    metadata = gguf_metadata(model.config) | tokenizer_to_gguf(tokenizer, stop_ids, model.config.vocab_size)
    metadata |= {"general.name": path.stem, "general.quantization_version": 2}
    tensors = {name: (shape, gguf_format(name, shape, format, tied), make) for name, shape, make in gguf_tensors(model)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_gguf(temporary, metadata, tensors, format)
        _, back = gguf_config(GGUFFile(temporary))
        if not same_for_inference(model.config, back):
            raise ValueError(f"the metadata of GGUF files can't say all of {model.config}; they give {back}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
