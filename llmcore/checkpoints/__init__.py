"""Checkpoints: safetensors and JSON, written atomically, verified when read. Nothing is pickled."""

from llmcore.checkpoints.sharded import TensorFiles, write_tensor_files
from llmcore.checkpoints.store import (
    Checkpoint,
    CheckpointError,
    check_tensors,
    copy_tensors,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    model_tensors,
    read_json,
    resolve,
    save_checkpoint,
    verify_checkpoint,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorFiles",
    "check_tensors",
    "copy_tensors",
    "find_latest",
    "list_checkpoints",
    "load_checkpoint",
    "model_tensors",
    "read_json",
    "resolve",
    "save_checkpoint",
    "verify_checkpoint",
    "write_tensor_files",
]
