from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import llmcore.data
from llmcore.data import Texts, TokenDataset, prepare
from llmcore.tokenizers import train_tokenizer

TEXTS = [f"document {i} " * (i % 7 + 1) for i in range(1000)]


class Interrupted(Texts):
    """Stops after `limit` documents; fingerprints as the whole."""

    limit = 700

    def _documents(self):
        for index, document in enumerate(super()._documents()):
            if index == self.limit:
                raise KeyboardInterrupt
            yield document


def test_every_document_stands_there_with_eos(real_source, real_tokenizer, real_dataset):
    documents = list(real_source)
    assert len(real_dataset) == len(documents)
    assert len(real_dataset.meta["shards"]) > 2
    for index, document in enumerate(documents):
        tokens = real_dataset.document(index)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == real_tokenizer.encode(document.text, add_eos=True)
    assert real_dataset.num_tokens == sum(len(real_dataset.document(i)) for i in range(len(documents)))
    assert real_dataset.meta["text_bytes"] == sum(len(document.text.encode()) for document in documents)
    assert real_dataset.skips.counts == real_source.skips.counts
    real_dataset.verify()
    with pytest.raises(IndexError):
        real_dataset.document(len(documents))


def test_bos_and_wide_ids(tmp_path, byte_tokenizer):
    dataset = prepare(Texts(["ab"]), byte_tokenizer, tmp_path / "bos", add_bos=True)
    assert dataset.document(0).tolist() == [byte_tokenizer.bos_id, 97, 98, byte_tokenizer.eos_id]
    wide = train_tokenizer((str(i) for i in range(70_000)), kind="word", vocab_size=80_000, min_frequency=1)
    assert wide.vocab_size > 2**16
    dataset = prepare(Texts(["69999 1", "0"]), wide, tmp_path / "wide")
    assert dataset.document(0).dtype == np.uint32
    assert wide.decode(dataset.document(0), skip_special_tokens=True) == "69999 1"
    assert max(dataset.document(0)) > 2**16 - 1 or max(dataset.document(1)) > 2**16 - 1


def test_reuse_and_replacement(tmp_path, byte_tokenizer):
    calls: list[int] = []

    def make(texts=TEXTS, **options):
        calls.clear()
        return prepare(Texts(texts), byte_tokenizer, tmp_path, progress=lambda *done: calls.append(done), **options)

    first = make()
    assert calls[-1] == (1000, first.num_tokens)
    again = make()
    assert not calls
    assert again.meta == first.meta
    other = make(TEXTS[:10])
    assert calls
    assert len(other) == 10
    assert other.content_hash != first.content_hash
    assert other.document(3).tobytes() == first.document(3).tobytes(), "an open data set outlives its replacement"
    names = {f"{shard['name']}.{suffix}" for shard in other.meta["shards"] for suffix in ("bin", "npy")}
    assert set(os.listdir(tmp_path)) == {*names, "meta.json", ".lock"}
    (tmp_path / "notes.txt").write_text("not ours")
    assert make(shard_tokens=1000).meta["shards"] != first.meta["shards"]
    assert (tmp_path / "notes.txt").read_text() == "not ours"


def test_finished_data_in_a_folder_that_cannot_be_written(tmp_path, byte_tokenizer, monkeypatch):
    first = prepare(Texts(TEXTS), byte_tokenizer, tmp_path)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("llmcore.data.shards._only_process", refuse)
    assert prepare(Texts(TEXTS), byte_tokenizer, tmp_path).meta == first.meta
    with pytest.raises(PermissionError):
        prepare(Texts(TEXTS[1:]), byte_tokenizer, tmp_path)


def test_an_interrupted_call_goes_on_and_gives_the_same(tmp_path, byte_tokenizer):
    whole = prepare(Texts(TEXTS), byte_tokenizer, tmp_path / "whole", shard_tokens=5000)
    with pytest.raises(KeyboardInterrupt):
        prepare(Interrupted(TEXTS), byte_tokenizer, tmp_path / "cut", shard_tokens=5000)
    with pytest.raises(FileNotFoundError, match="no token data"):
        TokenDataset(tmp_path / "cut")
    calls: list[tuple[int, int]] = []
    resumed = prepare(
        Texts(TEXTS), byte_tokenizer, tmp_path / "cut", shard_tokens=5000, progress=lambda *done: calls.append(done)
    )
    assert calls[0][0] > 256, "the first shards are not tokenised again"
    assert resumed.meta == whole.meta


def test_a_failing_rebuild_leaves_the_old_data(tmp_path, byte_tokenizer):
    old = prepare(Texts(["a", "b"]), byte_tokenizer, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(Interrupted(TEXTS), byte_tokenizer, tmp_path, shard_tokens=5000)
    with pytest.raises(ValueError, match="holds no documents"):
        prepare(Texts([" "]), byte_tokenizer, tmp_path)
    assert TokenDataset(tmp_path).meta == old.meta
    TokenDataset(tmp_path).verify()


KILLED = """
import sys, time
from llmcore.data import Texts, prepare
from llmcore.tokenizers import train_tokenizer

class Slow(Texts):
    def _documents(self):
        for document in super()._documents():
            time.sleep(0.001)
            yield document

texts = [f"document {i} " * (i % 7 + 1) for i in range(1000)]
prepare(Slow(texts), train_tokenizer([], kind="byte"), sys.argv[1], shard_tokens=5000)
"""


def test_kill_9_at_any_time(tmp_path, byte_tokenizer):
    whole = prepare(Texts(TEXTS), byte_tokenizer, tmp_path / "whole", shard_tokens=5000)
    environment = {**os.environ, "PYTHONPATH": str(Path(llmcore.data.__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "cut")], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("*-00002.bin*")) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="no token data"):
        TokenDataset(tmp_path / "cut")
    assert prepare(Texts(TEXTS), byte_tokenizer, tmp_path / "cut", shard_tokens=5000).meta == whole.meta


def test_two_at_once_work_one_after_the_other(tmp_path, byte_tokenizer):
    results, calls = [], []

    def work():
        results.append(prepare(Texts(TEXTS), byte_tokenizer, tmp_path, progress=lambda *done: calls.append(done[0])))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.meta for result in results] == [results[0].meta] * 3
    assert calls.count(1000) == 1, "one tokenised, the others reused"


def test_mismatched_tokenizer(tmp_path, byte_tokenizer, real_tokenizer):
    prepare(Texts(["a"]), byte_tokenizer, tmp_path)
    TokenDataset(tmp_path, byte_tokenizer)
    with pytest.raises(ValueError, match=f"not by {real_tokenizer.fingerprint}"):
        TokenDataset(tmp_path, real_tokenizer)
    with pytest.raises(ValueError, match="has no eos_token"):
        prepare(Texts(["a"]), train_tokenizer([], kind="byte", eos_token=None), tmp_path)
    with pytest.raises(ValueError, match="shard_tokens must be at least 1"):
        prepare(Texts(["a"]), byte_tokenizer, tmp_path, shard_tokens=0)


def test_damaged_shards(tmp_path, byte_tokenizer):
    dataset = prepare(Texts(TEXTS[:50]), byte_tokenizer, tmp_path)
    shard = tmp_path / f"{dataset.meta['shards'][0]['name']}.bin"
    offsets = shard.with_suffix(".npy")
    tokens, index = shard.read_bytes(), offsets.read_bytes()

    shard.write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match=f"has {len(tokens) - 2} bytes, not {len(tokens)}: truncated"):
        TokenDataset(tmp_path)
    shard.write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
    with pytest.raises(ValueError, match=r"\.bin is damaged"):
        TokenDataset(tmp_path).verify()
    shard.unlink()
    with pytest.raises(ValueError, match=r"\.bin is missing"):
        TokenDataset(tmp_path)
    shard.write_bytes(tokens)

    for length in (0, 5, 60, len(index) - 8):
        offsets.write_bytes(index[:length])
        with pytest.raises(ValueError, match=r"\.npy is truncated or damaged"):
            TokenDataset(tmp_path)
    np.save(offsets, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"\.npy is truncated or damaged"):
        TokenDataset(tmp_path)
    values = np.frombuffer(index[-51 * 8 :], dtype="<i8").copy()
    swapped = values[[0, 2, 1, *range(3, 51)]]
    for wrong in (values[:-1], values.astype(np.int32), values[::-1], swapped):
        np.save(offsets, wrong)
        with pytest.raises(ValueError, match=r"\.npy"):
            TokenDataset(tmp_path)
    offsets.unlink()
    with pytest.raises(ValueError, match=r"\.npy is missing"):
        TokenDataset(tmp_path)

    repaired = prepare(Texts(TEXTS[:50]), byte_tokenizer, tmp_path)
    repaired.verify()
    assert repaired.meta == dataset.meta


def test_damaged_meta(tmp_path, byte_tokenizer):
    prepare(Texts(TEXTS[:50]), byte_tokenizer, tmp_path)
    file = tmp_path / "meta.json"
    good = json.loads(file.read_text())

    def refused(match):
        with pytest.raises(ValueError, match=match):
            TokenDataset(tmp_path)

    file.write_text(file.read_text()[:-20])
    refused("meta.json is unreadable")
    for wrong in ([], {}, {**good, "format": "other"}):
        file.write_text(json.dumps(wrong))
        refused("is not of format")
    for key in ("tokens", "documents", "vocab_size", "shards", "skips", "tokenizer", "dtype"):
        file.write_text(json.dumps({**good, key: None}))
        refused(f"{key} must be")
    file.write_text(json.dumps({**good, "tokens": good["tokens"] + 1}))
    refused("is not the sum")
    file.write_text(json.dumps({**good, "dtype": "<f8"}))
    refused("dtype must be <u2 or <u4, not '<f8'")
    for name in ("../../etc/passwd", None, 3):
        file.write_text(json.dumps({**good, "shards": [{**good["shards"][0], "name": name}]}))
        refused("not a shard entry")
