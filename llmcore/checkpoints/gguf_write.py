"""Writes GGUF files, by the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcore.checkpoints.gguf import BLOCKS

#: what can be written; `gguf_format` says which tensors of a model get it
WRITABLE = ("f16", "bf16", "q8_0", "q4_0")
_FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}


def gguf_format(name: str, shape: Sequence[int], wanted: str, tied: bool) -> str:
    """The format of a tensor in a file of the format `wanted`: matrices have it, what is small is float32. In "q4_0"
    the output matrix, and the table that serves as one, is "q8_0", since an error there is in every logit; rows that
    are no multiple of a block are "f16"."""
    if len(shape) < 2 or name.endswith(("norm.weight", ".bias", "position_embd.weight", "ffn_gate_inp.weight")):
        return "f32"
    output = name == "output.weight" or (tied and name == "token_embd.weight")
    format_ = "q8_0" if wanted == "q4_0" and output else wanted
    return "f16" if format_ in BLOCKS and shape[-1] % BLOCKS[format_][0] else format_


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Sequence[int], str, Callable[[], Tensor]]],
    format_: str,
) -> None:
    """Writes a file.

    Args:
        metadata: text, truth values, whole numbers (below 2^32), floats (written as float32) and lists of one kind.
        tensors: name -> shape, format, and a function that gives the tensor when its turn comes.
        format_: of `WRITABLE`, for the record.

    Raises:
        ValueError: when a number is too large for float16.
        ImportError: without the package.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
    except ImportError:
        raise ImportError("writing GGUF files needs the package gguf: pip install 'llmcore[gguf]'") from None
    writer = GGUFWriter(path, metadata["general.architecture"])
    for name, value in (metadata | {"general.file_type": _FILE_TYPES[format_]}).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif name != "general.architecture":
            kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
            writer.add_key_value(name, value, kinds.get(type(value), GGUFValueType.STRING))
    for name, (shape, kind, _) in tensors.items():
        per_block, block_bytes = BLOCKS.get(kind, (1, 4 if kind == "f32" else 2))
        last = shape[-1] // per_block * block_bytes
        stored = (*shape[:-1], last) if kind in BLOCKS or kind == "bf16" else shape
        dtype = {"f32": np.float32, "f16": np.float16}.get(kind, np.uint8)
        num_bytes = int(np.prod(shape[:-1], dtype=object)) * last
        writer.add_tensor_info(name, stored, np.dtype(dtype), num_bytes, GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, kind, tensor) in tensors.items():
        writer.write_tensor_data(_stored(name, tensor(), kind, quants, GGMLQuantizationType))
    writer.close()


def _stored(name: str, tensor: Tensor, kind: str, quants: Any, types: Any) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if kind == "bf16":
        return tensor.to(torch.bfloat16).view(torch.uint8).numpy()
    if kind == "f16":
        half = tensor.half()
        if not torch.equal(half.isfinite(), tensor.isfinite()):
            raise ValueError(f"tensor {name!r} holds numbers too large for f16; accepted: bf16")
        return half.numpy()
    values = tensor.float().numpy()
    return values if kind == "f32" else quants.quantize(values, types[kind.upper()])
