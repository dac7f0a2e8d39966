"""The GGUF reader: what the `gguf` package reads, and one error for every file that is cut short or lies."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from llmcore.checkpoints import CheckpointError
from llmcore.checkpoints.gguf import BLOCKS, FLOATS, TYPE_IDS, GGUFFile

gguf = pytest.importorskip("gguf")

METADATA = {
    "a.text": "λ text", "a.empty": "", "a.yes": True, "a.no": False, "a.int": 7, "a.float": 0.1,
    "a.texts": ["one", "", "drei"], "a.ints": [1, -2, 3], "a.floats": [0.5, -1.5],
}  # fmt: skip


def write(path, metadata=METADATA, alignment=None):
    """A file by the gguf package with a tensor of every format."""
    writer = gguf.GGUFWriter(path, "test")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
            getattr(writer, kinds[type(value)])(name, value)
    writer.add_uint64("b.u64", 2**63 + 1)
    writer.add_int8("b.i8", -5)
    writer.add_float64("b.f64", 1e300)
    rng = np.random.default_rng(0)
    for name in [*FLOATS, *BLOCKS]:
        kind = gguf.GGMLQuantizationType[name.upper()]
        if name == "f16":
            writer.add_tensor(f"t.{name}", rng.standard_normal((3, 5)).astype(np.float16))
        elif name == "f32":
            writer.add_tensor(f"t.{name}", rng.standard_normal((2, 3, 4)).astype(np.float32))
        elif name == "bf16":
            blocks = rng.integers(0, 127, (4, 2 * 7), dtype=np.uint8)
            writer.add_tensor(f"t.{name}", blocks, raw_dtype=kind)
        else:
            blocks = rng.integers(0, 256, (2, 3 * BLOCKS[name][1]), dtype=np.uint8)
            writer.add_tensor(f"t.{name}", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_list(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("alignment", [None, 64])
def test_reads_what_the_gguf_package_reads(alignment, tmp_path):
    path = write(tmp_path / "a.gguf", alignment=alignment)
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for name, field in fields.items():
        assert as_list(file.metadata[name]) == field.contents(), name
    assert list(file) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        ours = file[tensor.name]
        assert ours.format == tensor.tensor_type.name.lower()
        assert ours.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert ours.quantized == (ours.format in BLOCKS)
        raw = ours.data.contiguous().view(torch.uint8).flatten().numpy()
        assert np.array_equal(raw, tensor.data.view(np.uint8).flatten())


def test_the_numbers_of_the_formats():
    for name, number in TYPE_IDS.items():
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert kind == number
        if name in BLOCKS:
            assert gguf.GGML_QUANT_SIZES[kind] == BLOCKS[name]


def test_tensors_are_views_of_the_file(tmp_path):
    file = GGUFFile(write(tmp_path / "a.gguf"))
    assert file["t.q4_k"].data.untyped_storage().data_ptr() == file["t.f32"].data.untyped_storage().data_ptr()


# ---- files that lie, put together by hand


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def tensor(name="t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def file_of(entries=(), tensors=(), *, counts=None, version=3, magic=b"GGUF", data=1024, tail=None):
    num_tensors, num_entries = (len(tensors), len(entries)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data) if tail is None else head + tail


U32 = struct.Struct("<I").pack
LIES = {
    "nothing": (b"", "has 0 bytes; the header of a GGUF file has 24"),
    "magic": (file_of(magic=b"GGML"), r"starts with b'GGML'; accepted: b'GGUF'"),
    "version": (file_of(version=1), "version is 1; accepted: 2, 3"),
    "big-endian": (file_of(version=3 << 24), r"version is 50331648 \(a big-endian file\); accepted: 2, 3"),
    "tensor count": (file_of(counts=(2**60, 0)), f"promises {2**60} tensors, which need"),
    "entry count": (file_of(counts=(0, 2**62)), f"promises {2**62} metadata entries, which need"),
    "one entry too many": (file_of([entry("abcdefg", 4, U32(1))], counts=(0, 2), tail=b"abc"), "entry 1: needs 8"),
    "key length": (file_of([struct.pack("<Q", 2**63) + b"abc" + bytes(20)]), f"metadata entry 0: needs {2**63} bytes"),
    "text length": (file_of([entry("a", 8, struct.pack("<Q", 5000) + b"x" * 50)]), "metadata 'a': needs 5000 bytes"),
    "text of no UTF-8": (file_of([entry("a", 8, text(b"\xff\xfe"))]), "metadata 'a': the string at .* is no UTF-8"),
    "type": (file_of([entry("a", 13, bytes(8))]), "metadata 'a': has the unknown type 13"),
    "truth value": (file_of([entry("a", 7, b"\x02")]), "metadata 'a': holds 2 for a truth value; accepted: 0 or 1"),
    "array length": (
        file_of([entry("a", 9, struct.pack("<IQ", 5, 2**61))]), f"metadata 'a': promises {2**61} numbers"
    ),
    "texts": (file_of([entry("a", 9, struct.pack("<IQ", 8, 2**40))]), f"metadata 'a': promises {2**40} strings"),
    "a text in an array": (
        file_of([entry("a", 9, struct.pack("<IQ", 8, 2) + text("x") + struct.pack("<Q", 2**33))]),
        f"metadata 'a': needs {2**33} bytes",
    ),
    "arrays of arrays": (
        file_of([entry("a", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "metadata 'a': is an array of type 9; accepted"
    ),
    "key twice": (file_of([entry("a", 4, U32(1))] * 2), "metadata 'a': is there twice"),
    "tensor twice": (file_of([], [tensor(), tensor(offset=128)]), "tensor 't': is there twice"),
    "alignment 0": (file_of([entry("general.alignment", 4, U32(0))]), "general.alignment is 0; accepted: a power"),
    "alignment 24": (file_of([entry("general.alignment", 4, U32(24))]), "general.alignment is 24"),
    "alignment of text": (file_of([entry("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "no dimensions": (file_of([], [tensor(dims=())]), "tensor 't': has 0 dimensions; accepted: 1 to 4"),
    "dimensions": (file_of([], [tensor(dims=(1,) * 5)]), "tensor 't': has 5 dimensions; accepted: 1 to 4"),
    "many dimensions": (file_of([], [text("t") + U32(2**32 - 1)]), "tensor 't': has 4294967295 dimensions"),
    "dimension 0": (file_of([], [tensor(dims=(32, 0))]), r"tensor 't': has shape \(0, 32\)"),
    "half a block": (file_of([], [tensor(dims=(33,), kind=2)]), "accepted in q4_0: rows of whole blocks of 32"),
    "tensor type": (file_of([], [tensor(kind=39)]), r"tensor 't': has type 39; accepted: 0 \(f32\), "),
    "size": (file_of([], [tensor(dims=(2**40,))]), rf"has shape \({2**40},\) in f32, {2**42} bytes"),
    "size past 64 bits": (file_of([], [tensor(dims=(2**40, 2**40))]), rf"\) in f32, {2**82} bytes"),
    "offset": (file_of([], [tensor(offset=2**40)]), f"at offset {2**40}; the file has"),
    "offset past the end": (file_of([], [tensor(offset=1024)]), "tensor 't' needs bytes up to .*, the file has"),
    "offset between": (file_of([], [tensor(offset=8)]), "tensor 't' has offset 8; accepted: multiples of 32"),
    "overlap": (
        file_of([], [tensor("a", dims=(64,)), tensor("b", offset=128)]),
        "tensors 'a' and 'b' overlap: the first ends at 256, the second has offset 128",
    ),
    "cut data": (file_of([], [tensor(dims=(64,))], data=255), "tensor 't' needs bytes up to .*: cut short or lying"),
    "part of several": (file_of([entry("split.count", 2, struct.pack("<H", 3))]), "is one of 3 parts; accepted"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_error(lie, tmp_path):
    content, message = LIES[lie]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")


def test_no_file_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="not readable"):
        GGUFFile(tmp_path / "no.gguf")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: "):
        GGUFFile(tmp_path)


def test_every_truncation_is_an_error(tmp_path):
    """Of the header at every byte, of the data here and there."""
    whole = write(tmp_path / "a.gguf").read_bytes()
    start = GGUFFile(tmp_path / "a.gguf")._start
    path = tmp_path / "cut.gguf"
    for size in [*range(start), *range(start, len(whole) - 31, 37)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=str(path)):
            GGUFFile(path)


@pytest.mark.parametrize("seed", range(20))
def test_mutations_of_the_header(seed, tmp_path):
    """Flipped bits, bytes, inserted and lost bytes, and large numbers where there were small ones: an error, or a file
    whose every tensor lies within it."""
    whole = write(tmp_path / "a.gguf").read_bytes()
    start = GGUFFile(tmp_path / "a.gguf")._start
    rng, path, refused = random.Random(seed), tmp_path / "b.gguf", 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, kind = rng.randrange(start), rng.randrange(5)
            if kind == 0:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                content[at] = rng.choice([0, 1, 127, 128, 255])
            elif kind == 2:
                content[at : at + 8] = struct.pack("<Q", rng.choice([0, 2**31, 2**32, 2**62, 2**64 - 1]))
            elif kind == 3:
                del content[at : at + rng.randint(1, 40)]
            else:
                content[at:at] = rng.randbytes(rng.randint(1, 40))
        path.write_bytes(content)
        tracemalloc.start()
        try:
            file = GGUFFile(path)
            total = sum(file[name].data.nbytes for name in file)
            assert total <= len(content)
            assert sum(int(file[name].data.view(torch.uint8).sum()) for name in file) >= 0  # every byte is there
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 (a right load is right too)
            refused += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1 << 21
    assert refused > 30
