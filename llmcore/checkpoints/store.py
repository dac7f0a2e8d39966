"""The checkpoint folder: what is in it, how it is written whole or not at all, and how it is read.

    checkpoints/
      latest                        the name of the newest whole checkpoint, one line
      step-000123/
        config.json                 the model's configuration
        model.safetensors           the weights, in the dtype the model computes in
        optimizer.safetensors       fp32 masters and moments (absent from a checkpoint for inference only)
        state.json                  step, counters, random states, data cursor, versions
        manifest.json               size and SHA-256 of every file above; written last

A checkpoint is built in a hidden folder, synced to disk and renamed, so a folder named ``step-*`` is whole unless the
disk damaged it later; the manifest finds that out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"^(\.replaced-)?step-(\d+)$")
_MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or not for this model. Names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and verified. ``optimizer`` is empty when it was left out or not asked for."""

    path: Path
    step: int
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, each storage once: of tied weights only the first name is kept."""
    seen: set[tuple[int, torch.Size]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    return tensors


def check_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise :class:`CheckpointError` naming ``source`` and the tensor unless ``tensors`` has the names, shapes and
    dtypes of ``into``."""
    missing, extra = sorted(into.keys() - tensors.keys()), sorted(tensors.keys() - into.keys())
    if missing:
        raise CheckpointError(f"{source}: tensor {missing[0]!r} is missing ({len(missing)} missing in all)")
    if extra:
        raise CheckpointError(f"{source}: tensor {extra[0]!r} has no place in this model ({len(extra)} such in all)")
    for name, target in into.items():
        have, want = tensors[name], target
        if have.shape != want.shape:
            raise CheckpointError(
                f"{source}: tensor {name!r} has shape {tuple(have.shape)}; this model has {tuple(want.shape)}"
            )
        if have.dtype != want.dtype:
            raise CheckpointError(f"{source}: tensor {name!r} is {have.dtype}; this model holds it as {want.dtype}")


@torch.no_grad()
def copy_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy ``tensors`` over the tensors of the same names in ``into``, after :func:`check_tensors`."""
    check_tensors(into, tensors, source)
    for name, target in into.items():
        target.copy_(tensors[name])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path}: not written: {error}") from None


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write ``root/step-<step>`` atomically, point ``root/latest`` at it, and keep ``keep_last`` up to this step.

    ``model`` and ``optimizer`` map names to tensors (no two sharing storage: see :func:`model_tensors`); ``config``
    and ``state`` must be plain JSON values. A checkpoint of the same step is replaced. Old ones go only after the new
    one is on disk. Gives the new folder.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; accepted is 1 or more")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:06d}"
    building = root / f".building-{final.name}"
    for leftover in root.glob(".building-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    building.mkdir()
    _write_json(building / "config.json", dict(config))
    _write_tensors(building / "model.safetensors", model)
    if optimizer:
        _write_tensors(building / "optimizer.safetensors", optimizer)
    _write_json(building / "state.json", {"step": step, **(state or {})})
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(building.iterdir())}
    _write_json(building / _MANIFEST, {"format": FORMAT, "files": files})
    for path in building.iterdir():
        _sync(path)
    _sync(building)
    if final.exists():  # a folder can't be renamed over one that isn't empty
        old = root / f".replaced-{final.name}"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        building.rename(final)
        shutil.rmtree(old)
    else:
        building.rename(final)
    pointer = root / ".latest"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _sync(pointer)
    pointer.replace(root / "latest")
    _sync(root)
    checkpoints = list_checkpoints(root)
    for old in checkpoints[checkpoints.index(final) + 1 :][keep_last - 1 :]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoint folders under ``root``, newest first; not verified.

    A ``.replaced-step-*`` folder counts too: a run killed while it replaced a checkpoint leaves one behind.
    """
    root = Path(root)
    folders = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    found = [(int(m[2]), m[1] is None, p) for p in folders if (m := _NAME.match(p.name))]
    return [path for _, _, path in sorted(found, reverse=True)]


def verify_checkpoint(path: str | Path) -> None:
    """Raise :class:`CheckpointError`, naming the file and the reason, unless every file is as it was written."""
    path = Path(path)
    files = read_json(path / _MANIFEST).get("files")
    if not isinstance(files, dict) or not {"config.json", "model.safetensors", "state.json"} <= files.keys():
        raise CheckpointError(f"{path / _MANIFEST}: does not list the files of a checkpoint")
    for name, known in files.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{path / _MANIFEST}: {name!r} is not a plain file name")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if not isinstance(known, dict) or known.keys() != {"size", "sha256"}:
            raise CheckpointError(f"{path / _MANIFEST}: has no size and SHA-256 of {name!r}")
        if (size := file.stat().st_size) != known["size"]:
            raise CheckpointError(
                f"{file}: has {size} bytes, was written with {known['size']}: cut short or overwritten"
            )
        if _sha256(file) != known["sha256"]:
            raise CheckpointError(f"{file}: its SHA-256 is not the one it was written with: the file is damaged")


def find_latest(root: str | Path) -> Path | None:
    """The newest whole checkpoint under ``root``, or None. One that is not whole is passed over with a warning."""
    for path in list_checkpoints(root):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            continue
        return path
    return None


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from a run folder, a ``checkpoints`` folder or a checkpoint folder itself."""
    path = Path(path)
    if (path / _MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    for root in (path / "checkpoints", path):
        if (found := find_latest(root)) is not None:
            return found
    raise CheckpointError(f"{path}: holds no whole checkpoint (looked for checkpoints/step-* and step-*)")


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in a file; raises :class:`CheckpointError`, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else f"a {kind.__name__}"
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not {wanted}")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {error}") from None


def load_checkpoint(path: str | Path, *, optimizer: bool = True) -> Checkpoint:
    """Verify and read a checkpoint folder; ``optimizer=False`` leaves the optimizer's tensors on disk.

    Damage of any kind raises :class:`CheckpointError` naming the file and the reason.
    """
    path = Path(path)
    verify_checkpoint(path)
    state = read_json(path / "state.json")
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path / 'state.json'}: has no whole number 'step'")
    has_optimizer = (path / "optimizer.safetensors").is_file()
    return Checkpoint(
        path=path,
        step=state["step"],
        config=read_json(path / "config.json"),
        model=_read_tensors(path / "model.safetensors"),
        optimizer=_read_tensors(path / "optimizer.safetensors") if optimizer and has_optimizer else {},
        state=state,
    )
