from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore.data import PackedDataset
from llmcore.data.packing import IGNORE, epoch_order, hash64

MASK = 2**64 - 1


def check(batch, row_len: int, eos: int, padding: int = 0) -> None:
    """What holds for every batch, from the batch alone."""
    total = batch.rows * row_len
    tokens, targets, cu = batch.tokens, batch.targets, batch.cu_seqlens.tolist()
    assert (tokens.dtype, targets.dtype, batch.positions.dtype) == (torch.int64,) * 3
    assert batch.cu_seqlens.dtype == torch.int32
    assert tokens.shape == targets.shape == batch.positions.shape == (total,)
    assert cu[0] == 0
    assert cu[-1] == total
    assert set(range(0, total, row_len)) <= set(cu), "no piece spans two rows"
    lengths = [end - start for start, end in itertools.pairwise(cu)]
    assert min(lengths) > 0
    assert max(lengths) == batch.max_seqlen
    assert batch.positions.tolist() == [position for length in lengths for position in range(length)]
    assert batch.num_targets == int((targets != IGNORE).sum())
    real = total - padding
    assert not (targets[real:] != IGNORE).any()
    for start, end in itertools.pairwise(cu):
        if start >= real:
            continue
        assert not (tokens[start : end - 1] == eos).any(), "a document ends only where its piece ends"
        assert torch.equal(targets[start : end - 1], tokens[start + 1 : end])
        assert (targets[end - 1] == IGNORE) == (tokens[end - 1] == eos), "only a document's end has no target"


def same(a, b) -> bool:
    fields = ("tokens", "targets", "positions", "cu_seqlens")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) and (a.rows, a.max_seqlen, a.num_targets) == (
        b.rows,
        b.max_seqlen,
        b.num_targets,
    )


def epoch_stream(packed: PackedDataset, epoch: int) -> np.ndarray:
    """All (token, target) of an epoch, (tokens, 2), straight from the documents."""
    spans = []
    for index in range(len(packed.dataset)):
        document = packed.dataset.document(index).astype(np.int64)
        pairs = np.stack([document, np.append(document[1:], IGNORE)], axis=1)
        spans += [pairs[at : at + packed.row_len] for at in range(0, len(pairs), packed.row_len)]
    order = epoch_order(len(spans), packed.seed, epoch) if packed.shuffle else range(len(spans))
    return np.concatenate([spans[index] for index in order])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    row_len=st.integers(1, 33),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_each_token_once_an_epoch_and_no_target_lost(make_dataset, lengths, row_len, batch_size, seed, shuffle):
    dataset = make_dataset([chr(97 + i) * length for i, length in enumerate(lengths)])
    eos = dataset.meta["eos_id"]
    packed = PackedDataset(dataset, row_len=row_len, batch_size=batch_size, seed=seed, shuffle=shuffle)
    expected = np.concatenate([epoch_stream(packed, epoch) for epoch in range(4)])
    seen, targets = [], []
    while packed.epoch < 3:
        batch = next(packed)
        check(batch, row_len, eos)
        seen.append(batch.tokens)
        targets.append(batch.targets)
        if len(seen) * row_len * batch_size > 3 * dataset.num_tokens:
            break
    seen, targets = torch.cat(seen).numpy(), torch.cat(targets).numpy()
    if len(seen) > len(expected):  # one batch may hold several epochs of a tiny data set
        more = (len(seen) // dataset.num_tokens) + 2
        expected = np.concatenate([epoch_stream(packed, epoch) for epoch in range(more)])
    assert np.array_equal(np.stack([seen, targets], axis=1), expected[: len(seen)])

    evaluated = list(packed.eval_batches())
    padding = -dataset.num_tokens % row_len
    for batch in evaluated:
        check(batch, row_len, eos, padding if batch is evaluated[-1] else 0)
    flat = torch.cat([batch.tokens for batch in evaluated]).numpy()
    stored = np.concatenate([dataset.document(index) for index in range(len(dataset))])
    assert np.array_equal(flat[: dataset.num_tokens], stored)
    assert len(flat) == dataset.num_tokens + padding
    assert sum(batch.num_targets for batch in evaluated) == dataset.num_tokens - len(dataset)
    assert all(batch.rows == batch_size for batch in evaluated[:-1])


def test_real_text(real_dataset):
    packed = PackedDataset(real_dataset, row_len=512, batch_size=4, seed=1)
    seen = []
    while sum(map(len, seen)) < 2 * real_dataset.num_tokens:
        batch = next(packed)
        check(batch, 512, real_dataset.meta["eos_id"])
        seen.append(batch.tokens)
    expected = np.concatenate([epoch_stream(packed, epoch) for epoch in range(3)])
    flat = torch.cat(seen).numpy()
    assert np.array_equal(flat, expected[: len(flat), 0])


def test_a_long_document_does_not_fill_a_batch(make_dataset):
    """Each of 20 documents is as long as two batches; a batch of 8 rows still mixes most rows from different ones."""
    packed = PackedDataset(make_dataset([chr(97 + i) * 500 for i in range(20)]), row_len=32, batch_size=8)
    for _ in range(10):
        letters = set(next(packed).tokens.tolist())
        assert len(letters) >= 5


def test_evaluation_leaves_the_stream_alone(real_dataset):
    packed, untouched = (PackedDataset(real_dataset, row_len=128, batch_size=2) for _ in range(2))
    for _ in range(5):
        assert same(next(packed), next(untouched))
        assert next(packed.eval_batches()).rows == 2
    assert packed.state_dict() == untouched.state_dict()


# ---- order


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(1000, seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 2)}
    for order in orders.values():
        assert sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    assert all(abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15 for order in orders.values())


@given(seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 2**62), index=st.integers(0, 2**40))
def test_hash_is_splitmix64(seed, stream, index):
    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix((mix((seed + golden) & MASK) + stream + golden) & MASK)
    expected = mix((state + (index + 1) * golden) & MASK)
    assert int(hash64(seed, stream, np.array([index]))[0]) == expected


# ---- the cursor


def test_resume_at_random_points_gives_the_same_batches(real_dataset):
    def make():
        return PackedDataset(real_dataset, row_len=777, batch_size=3, seed=5)

    stream = make()
    states, batches = [], []
    for _ in range(3 * real_dataset.num_tokens // (777 * 3)):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(next(stream))
    assert stream.epoch >= 2
    for start in random.Random(0).sample(range(len(states) - 3), 12):
        resumed = make()
        resumed.load_state_dict(states[-1])  # what it did before must not matter, not even in a later epoch
        next(resumed)
        resumed.load_state_dict(states[start])
        assert all(same(next(resumed), batch) for batch in batches[start : start + 3])


def test_an_interrupted_batch_is_given_again(real_dataset, monkeypatch):
    packed, whole = (PackedDataset(real_dataset, row_len=300, batch_size=4) for _ in range(2))
    rows = itertools.count()
    read_row = packed.read_row

    def interrupted(cursor):
        if next(rows) == 2:
            raise KeyboardInterrupt
        return read_row(cursor)

    monkeypatch.setattr(packed, "read_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(packed)
    assert same(next(packed), next(whole))


def test_another_batch_size_goes_on_in_the_same_stream(real_dataset):
    four = PackedDataset(real_dataset, row_len=64, batch_size=4)
    two = PackedDataset(real_dataset, row_len=64, batch_size=2)
    next(four)
    two.load_state_dict(four.state_dict())
    rest = next(four)
    assert torch.equal(torch.cat([next(two).tokens, next(two).tokens]), rest.tokens)


def test_a_cursor_of_something_else_is_refused(make_dataset):
    texts = ["some text", "more text"]
    dataset = make_dataset(texts)

    def make(data=dataset, row_len=16, seed=0, shuffle=True):
        return PackedDataset(data, row_len=row_len, batch_size=1, seed=seed, shuffle=shuffle)

    state = make().state_dict()
    make(make_dataset(texts, "copy")).load_state_dict(state)  # the same tokens elsewhere on disk
    for other, match in (
        (make(row_len=17), "cursor is of another row_len: 16, here 17"),
        (make(seed=1), "cursor is of another seed: 0, here 1"),
        (make(shuffle=False), "cursor is of another shuffle"),
        (make(make_dataset([*texts, "x"], "other")), f"cursor is of another dataset: '{dataset.content_hash}'"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(state)
    for change, match in (
        ({"epoch": -1}, "epoch must be a whole number"),
        ({"epoch": 2**64}, "epoch must be a whole number"),
        ({"span": 2}, "span 2 of a dataset of 2 spans"),
        ({"offset": 10}, "offset 10 in a span of 10 tokens"),
        ({"offset": 1.0}, "offset must be a whole number"),
        ({"span": None}, "span must be a whole number"),
    ):
        packed = make()
        with pytest.raises(ValueError, match=match):
            packed.load_state_dict({**state, **change})
        assert packed.state_dict() == state
    with pytest.raises(ValueError, match="cursor has no 'dataset'"):
        make().load_state_dict({})


# ---- wrong input


def test_wrong_arguments(make_dataset):
    dataset = make_dataset(["a"])
    for options, match in (
        ({"row_len": 0, "batch_size": 1}, "row_len must be at least 1, not 0"),
        ({"row_len": 1, "batch_size": -2}, "batch_size must be at least 1, not -2"),
        ({"row_len": 1, "batch_size": 1, "seed": -1}, "seed must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            PackedDataset(dataset, **options)


def test_a_flipped_bit_on_disk_is_no_index_error_later(make_dataset):
    dataset = make_dataset(["some text"])
    shard = dataset.folder / f"{dataset.meta['shards'][0]['name']}.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 0x80
    shard.write_bytes(data)
    packed = PackedDataset(type(dataset)(dataset.folder), row_len=4, batch_size=2)
    with pytest.raises(ValueError, match="outside its vocabulary of 261: a shard is damaged"):
        next(packed)


def test_batch_to_device(make_dataset):
    batch = next(PackedDataset(make_dataset(["some text"]), row_len=4, batch_size=2)).to("meta")
    assert {t.device.type for t in (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens)} == {"meta"}
    assert batch.rows == 2
