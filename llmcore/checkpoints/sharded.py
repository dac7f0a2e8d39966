"""Tensors in one safetensors file or in several with an index, as model folders of the Hugging Face form hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcore.checkpoints.store import CheckpointError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a folder by name: of its model, or of one `file` in it. Files are mapped, not read: a tensor costs
    memory when it is asked for.

    Raises:
        CheckpointError: for a folder without tensors, a shard that is missing or not readable, or an index that
            contradicts its shards. Names the file.
    """

    def __init__(self, folder: str | Path, file: str | None = None) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if file is None and (index := self.folder / INDEX).is_file():
            self._read_index(index)
        elif (single := self.folder / (file or SINGLE)).is_file():
            self._file_of = dict.fromkeys(self._names(single), single)
        else:
            raise CheckpointError(f"{self.folder}: has no {file or f'{SINGLE} and no {INDEX}'}")

    def _read_index(self, index: Path) -> None:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to plain file names")
        for shard in sorted(set(shards.values())):
            file = self.folder / shard
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; {index.name} names it")
            promised = {name for name, place in shards.items() if place == shard}
            if lacking := sorted(promised - set(self._names(file))):
                raise CheckpointError(f"{file}: has no tensor {lacking[0]!r}; {index.name} says it does")
            self._file_of |= dict.fromkeys(promised, file)

    def _names(self, file: Path) -> list[str]:
        try:
            self._open[file] = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors: {error}") from None
        return list(self._open[file].keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def source(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} is not readable: {error}") from None


def write_tensor_files(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 4 << 30
) -> None:
    """Writes named tensors into `folder`: one safetensors file, or shards of up to `max_shard_bytes` (a larger tensor
    is a shard of its own) and their index."""
    folder = Path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / name}: not written: {error}") from None
        index |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
