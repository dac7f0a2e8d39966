"""GGUF files (specified in docs/gguf.md of the ggml project): metadata, and tensors that may be quantised in blocks.

    magic "GGUF", version | number of tensors, number of metadata entries
    metadata: name, type, value ...
    tensors:  name, dimensions (innermost first), type, offset into the data ...
    padding to the alignment, then the data of the tensors, each at a multiple of the alignment

Every count, length and offset is held against the size of the file before anything is made for it, so a truncated or
lying file is one error and costs no memory. The file is mapped, not read: tensors are views of the mapping. (The `gguf`
package's reader makes an array object for every token of the vocabulary, seconds for 50,000 of them, and believes the
sizes that it reads; the tests hold this one to it.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcore import _C
from llmcore.checkpoints.store import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

#: name -> elements and bytes of a block of a row
BLOCKS = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
#: the number that stands for a format in the file
TYPE_IDS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "bf16": 30,
}  # fmt: skip
_FORMATS = {number: name for name, number in TYPE_IDS.items()}

# the numbers of the types of metadata
_SCALARS = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
    10: np.uint64, 11: np.int64, 12: np.float64,
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as its file holds it.

    Attributes:
        format: "f32", "f16", "bf16" or the name of a block format: a key of `BLOCKS`.
        shape: of its numbers, outermost first, as torch counts.
        data: a float tensor of that shape; of a block format uint8, whose last dimension is the bytes of a row.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor

    @property
    def quantized(self) -> bool:
        return self.format in BLOCKS


class GGUFFile:
    """An open GGUF file: `metadata` by name, tensors by name as a mapping.

    Metadata arrays of numbers are numpy arrays, those of strings lists.

    Raises:
        CheckpointError: for anything that is no whole GGUF file of a supported version and supported types. Names the
            file, the entry and the value.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            if size < 24:
                raise CheckpointError(f"{self.path}: has {size} bytes; the header of a GGUF file has 24")
            self._bytes = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: not readable: {error}") from None
        reader = _Reader(self.path, memoryview(self._bytes.numpy()))
        num_tensors, num_entries = reader.header()
        self.metadata = reader.metadata(num_entries)
        self._check_single()
        self._infos = reader.tensors(num_tensors)
        self._start = self._data_start(reader.at)
        self._check_places(size)

    def _check_single(self) -> None:
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise CheckpointError(f"{self.path}: is one of {parts} parts; accepted: a model in one file")

    def _data_start(self, at: int) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 4 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}; accepted: a power of two, 4 to {1 << 20}"
            )
        for name, info in self._infos.items():
            if info.offset % alignment:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has offset {info.offset}; accepted: multiples of {alignment}"
                )
        return -(-at // alignment) * alignment

    def _check_places(self, size: int) -> None:
        end, before = 0, ""
        for name, info in sorted(self._infos.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise CheckpointError(
                    f"{self.path}: tensors {before!r} and {name!r} overlap: the first ends at {end}, the second has "
                    f"offset {info.offset}"
                )
            end, before = info.offset + info.num_bytes, name
            if self._start + end > size:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} needs bytes up to {self._start + end}, the file has {size}: cut "
                    "short or lying"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def format(self, name: str) -> str:
        return self._infos[name].format

    def __getitem__(self, name: str) -> GGUFTensor:
        if (info := self._infos.get(name)) is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        begin = self._start + info.offset
        data = self._bytes[begin : begin + info.num_bytes]
        if info.format in FLOATS:
            data = data.view(FLOATS[info.format]).view(info.shape)
        else:
            data = data.view(*info.shape[:-1], -1)
        return GGUFTensor(info.format, info.shape, data)


@dataclass(frozen=True)
class _Info:
    format: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class _Reader:
    """Goes through the header once; `at` is how far it is."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at, self.what = path, data, 0, "the header"

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.what}: {text}")

    def need(self, num_bytes: int) -> None:
        if num_bytes > (left := len(self.data) - self.at):
            raise self.fail(f"needs {num_bytes} bytes at {self.at}, the file has {left} more: cut short or lying")

    def number(self, kind: struct.Struct) -> int:
        self.need(kind.size)
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, end, unpack = self.data, len(self.data), _U64.unpack_from
        found, at = _C.read_strings(data, self.at, count)
        try:
            for _ in range(count - len(found)):  # from the first that is wrong
                (length,) = unpack(data, at)
                at += 8
                if length > end - at:
                    self.at = at
                    self.need(length)
                found.append(str(data[at : at + length], "utf-8"))
                at += length
        except struct.error:
            self.at = at
            self.need(8)
        except UnicodeDecodeError as error:
            raise self.fail(f"the string at {at} is no UTF-8: {error.reason}") from None
        self.at = at
        return found

    def header(self) -> tuple[int, int]:
        if bytes(self.data[:4]) != MAGIC:
            raise self.fail(f"starts with {bytes(self.data[:4])!r}; accepted: {MAGIC!r}")
        self.at = 4
        if (version := self.number(_U32)) not in VERSIONS:
            big = " (a big-endian file)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
            raise self.fail(f"version is {version}{big}; accepted: {', '.join(map(str, VERSIONS))}")
        num_tensors, num_entries = self.number(_U64), self.number(_U64)
        self.count("tensors", num_tensors, 8 + 4 + 8 + 4 + 8)  # a tensor's name, dimensions, type and offset
        self.count("metadata entries", num_entries, 8 + 4 + 1)
        return num_tensors, num_entries

    def count(self, what: str, count: int, least: int) -> None:
        """Raises unless so many things of at least so many bytes each can follow."""
        if count * least > (left := len(self.data) - self.at):
            raise self.fail(f"promises {count} {what}, which need {count * least} bytes; the file has {left} more")

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for number in range(count):
            self.what = f"metadata entry {number}"
            name = self.string()
            self.what = f"metadata {name!r}"
            if name in values:
                raise self.fail("is there twice")
            values[name] = self.value(self.number(_U32))
        self.what = "the header"
        return values

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number(_U32), self.number(_U64))
        if kind not in _SCALARS:
            raise self.fail(f"has the unknown type {kind}")
        return self.scalars(kind, 1)[0].item()

    def array(self, kind: int, count: int) -> list[str] | np.ndarray:
        if kind == _STRING:
            self.count("strings", count, 8)
            return self.strings(count)
        if kind not in _SCALARS:
            raise self.fail(f"is an array of type {kind}; accepted: numbers and strings")
        return self.scalars(kind, count)

    def scalars(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        self.count("numbers", count, dtype.itemsize)
        raw = self.data[self.at : self.at + count * dtype.itemsize]
        self.at += len(raw)
        if kind == 7 and (wrong := np.frombuffer(raw, np.uint8) > 1).any():
            raise self.fail(f"holds {raw[int(wrong.argmax())]} for a truth value; accepted: 0 or 1")
        return np.frombuffer(raw, dtype).astype(_SCALARS[kind])  # a copy: no view of the file's header stays

    def tensors(self, count: int) -> dict[str, _Info]:
        infos: dict[str, _Info] = {}
        for number in range(count):
            self.what = f"tensor {number}"
            name = self.string()
            self.what = f"tensor {name!r}"
            if name in infos:
                raise self.fail("is there twice")
            infos[name] = self.info()
        self.what = "the header"
        return infos

    def info(self) -> _Info:
        num_dims = self.number(_U32)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"has {num_dims} dimensions; accepted: 1 to {MAX_DIMS}")
        shape = tuple(reversed([self.number(_U64) for _ in range(num_dims)]))
        kind, offset = self.number(_U32), self.number(_U64)
        if (format_ := _FORMATS.get(kind)) is None:
            raise self.fail(f"has type {kind}; accepted: {', '.join(f'{n} ({name})' for n, name in _FORMATS.items())}")
        if format_ in FLOATS:
            per_block, block_bytes = 1, FLOATS[format_].itemsize
        else:
            per_block, block_bytes = BLOCKS[format_]
        if 0 in shape or shape[-1] % per_block:
            raise self.fail(f"has shape {shape}; accepted in {format_}: rows of whole blocks of {per_block}, none of 0")
        num_bytes = block_bytes
        for size in (*shape[:-1], shape[-1] // per_block):
            num_bytes *= size
        if num_bytes > len(self.data) or offset > len(self.data):
            raise self.fail(
                f"has shape {shape} in {format_}, {num_bytes} bytes, at offset {offset}; the file has {len(self.data)}"
            )
        return _Info(format_, shape, offset, num_bytes)


def is_gguf(path: str | Path) -> bool:
    """Whether a file starts as a GGUF file does."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def text_value(metadata: Mapping[str, Any], name: str) -> str | None:
    """A string of the metadata, or None.

    Raises:
        ValueError: when it is something else.
    """
    value = metadata.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; accepted: text")
    return value
