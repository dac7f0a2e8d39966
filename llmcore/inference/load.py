"""A trained model from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from llmcore.checkpoints import CheckpointError, copy_tensors, load_checkpoint, model_tensors, resolve
from llmcore.models import ModelConfig, Transformer
from llmcore.tokenizers import Tokenizer


def load_model(path: str | Path) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder or a checkpoint in one, in the dtype it was trained in, ready to run.

    Raises ``CheckpointError`` when there is no whole checkpoint or no tokenizer.
    """
    folder = resolve(path)
    checkpoint = load_checkpoint(folder, optimizer=False)
    try:
        model = Transformer(ModelConfig.from_dict(checkpoint.config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    for name, parameter in model.named_parameters():
        saved = checkpoint.model.get(name)
        if saved is not None and saved.dtype in (torch.bfloat16, torch.float16, torch.float32):
            parameter.data = parameter.data.to(saved.dtype)
    copy_tensors(model_tensors(model), checkpoint.model, folder / "model.safetensors")
    for place in (folder, folder.parent.parent):
        if (place / "tokenizer" / "tokenizer.json").is_file():
            return model.eval(), Tokenizer.load(place / "tokenizer")
    raise CheckpointError(f"{folder}: no tokenizer/tokenizer.json beside it or in its run folder")
