"""Folders of safetensors that are cut short or lie: an error that names the file, or a right load."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc

import pytest
import torch

from llmcore.checkpoints import CheckpointError, TensorFiles, write_tensor_files


def folder(path, shards=False):
    path.mkdir()
    tensors = [(f"t{i}", torch.randn(3, 4 + i, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    write_tensor_files(path, tensors, max_shard_bytes=100 if shards else 1 << 30)
    return dict(tensors)


def read(path):
    files = TensorFiles(path)
    return {name: files[name] for name in files}


def check(path, wanted):
    """Whether it is refused; else what it gives must be no larger than the files."""
    tracemalloc.start()
    try:
        tensors = read(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= sum(f.stat().st_size for f in path.iterdir())
        return False
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (a right load is right too)
        return True
    finally:
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(10))
def test_mutations_of_the_header(seed, tmp_path):
    wanted = folder(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng, refused = random.Random(seed), 0
    for _ in range(100):
        content = bytearray(whole)
        at, kind = rng.randrange(header), rng.randrange(4)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[:8] = struct.pack("<Q", rng.choice([0, 1, header, 2**31, 2**62, 2**64 - 1]))
        elif kind == 2:
            del content[at : at + rng.randint(1, 40)]
        else:
            content[at : at + 1] = rng.choice([b"9", b"-", b"{", b"0000", b"\xff", b'"'])
        file.write_bytes(content)
        refused += check(tmp_path / "a", wanted)
    assert refused > 50


def test_every_truncation_is_an_error(tmp_path):
    wanted = folder(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert check(tmp_path / "a", wanted), size


def lie(path, **changes):
    """Rewrites the header's entry of one tensor."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header["t1"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 60]}, {"data_offsets": [48, 2**40]}, {"data_offsets": [108, 48]}, {"shape": [3, 6]},
        {"shape": [2**40, 2**40]}, {"shape": [-3, -5]}, {"shape": [3, 0]}, {"dtype": "F64"}, {"dtype": "F33"},
    ],
    ids=str,
)  # fmt: skip
def test_lies_in_the_header(changes, tmp_path):
    wanted = folder(tmp_path / "a")
    lie(tmp_path / "a" / "model.safetensors", **changes)
    assert check(tmp_path / "a", wanted)


def test_lies_in_the_index(tmp_path):
    wanted = folder(tmp_path / "a", shards=True)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read(tmp_path / "a").items())
    index = tmp_path / "a" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    for change in (
        {"t0": "model-00009-of-00004.safetensors"}, {"t9": values["weight_map"]["t0"]}, {"t0": "../a/x.safetensors"},
        {"t0": 3}, {"t0": values["weight_map"]["t1"]},
    ):  # fmt: skip
        index.write_text(json.dumps({"weight_map": values["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            read(tmp_path / "a")
    for content in ("", "[]", "{", '{"weight_map": 3}', "[" * 100000):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=str(index)):
            read(tmp_path / "a")
