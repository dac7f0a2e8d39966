"""A trained model from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from llmcore.checkpoints import CheckpointError, check_tensors, copy_tensors, load_checkpoint, resolve
from llmcore.models import ModelConfig, Transformer
from llmcore.tokenizers import Tokenizer


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder or a checkpoint in one, in the dtype it was trained in, ready to run on
    ``device``.

    Raises ``CheckpointError`` when there is no whole checkpoint or no tokenizer.
    """
    folder = resolve(path).absolute()  # "." has no parent
    checkpoint = load_checkpoint(folder, optimizer=False)
    config = folder / "config.json"
    try:
        with torch.device("meta"):  # no memory for sizes that the file's tensors don't have
            model = Transformer(ModelConfig.from_dict(checkpoint.config))
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
