from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.data import Mixture, PackedDataset, Texts, prepare


@pytest.fixture(scope="module")
def datasets(byte_tokenizer, tmp_path_factory):
    """Three data sets whose tokens tell them apart."""
    folder = tmp_path_factory.mktemp("mixture")
    return {
        letter: prepare(Texts([letter * n for n in range(5, 60, 7)]), byte_tokenizer, folder / letter)
        for letter in "abc"
    }


WEIGHTS = {"a": 5.0, "b": 3.0, "c": 2.0}


def make(datasets, *, row_len=16, seed=3, weights=WEIGHTS, source_seed=0, batch_size=8) -> Mixture:
    sources = {
        name: PackedDataset(dataset, row_len=row_len, batch_size=1, seed=source_seed)
        for name, dataset in datasets.items()
    }
    return Mixture(sources, weights, batch_size=batch_size, seed=seed)


def origins(batch) -> list[str]:
    """The source of each row, from its tokens."""
    rows = batch.tokens.reshape(batch.rows, -1)
    return ["".join(sorted({chr(token) for token in row if token < 256})) for row in rows.tolist()]


def test_proportions_follow_the_weights(datasets):
    drawn = [origin for batch in itertools.islice(make(datasets), 500) for origin in origins(batch)]
    for name, weight in WEIGHTS.items():
        share = weight / 10
        assert abs(drawn.count(name) / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5
    runs = sum(x != y for x, y in itertools.pairwise(drawn)) / len(drawn)
    assert abs(runs - (1 - 0.25 - 0.09 - 0.04)) < 0.05, "neighbouring rows are drawn independently"


def test_each_source_gives_its_own_stream_in_order(datasets):
    mixture = make(datasets)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in datasets}
    for batch in itertools.islice(mixture, 60):
        for origin, row in zip(origins(batch), batch.tokens.reshape(batch.rows, -1)):
            rows[origin].append(row)
    for name, dataset in datasets.items():
        alone = PackedDataset(dataset, row_len=16, batch_size=len(rows[name]))
        assert torch.equal(next(alone).tokens, torch.cat(rows[name]))


def test_deterministic_by_seed_and_free_of_the_order_of_names(datasets):
    first = [batch.tokens for batch in itertools.islice(make(datasets), 20)]
    backwards = make(dict(reversed(datasets.items())), weights=dict(reversed(WEIGHTS.items())))
    assert all(torch.equal(a, b.tokens) for a, b in zip(first, backwards))
    assert not all(torch.equal(a, b.tokens) for a, b in zip(first, make(datasets, seed=4)))


def test_the_rows_do_not_depend_on_the_batch_size(datasets):
    eights = torch.cat([batch.tokens for batch in itertools.islice(make(datasets), 30)])
    fives = torch.cat([batch.tokens for batch in itertools.islice(make(datasets, batch_size=5), 48)])
    assert torch.equal(eights, fives)


def test_resume_gives_the_same_batches(datasets):
    mixture = make(datasets)
    states, batches = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(mixture.state_dict())))
        batches.append(next(mixture))
    for start in (0, 1, 17, 42, 55):
        resumed = make(datasets)
        next(resumed)
        resumed.load_state_dict(states[start])
        for batch in batches[start : start + 5]:
            again = next(resumed)
            assert torch.equal(again.tokens, batch.tokens)
            assert torch.equal(again.targets, batch.targets)
            assert torch.equal(again.cu_seqlens, batch.cu_seqlens)


@settings(max_examples=30, deadline=None)
@given(
    weights=st.fixed_dictionaries({name: st.floats(0.01, 10) for name in "abc"}),
    row_len=st.integers(1, 70),
    seed=st.integers(0, 2**63 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_resumed_before_every_batch_no_row_is_lost_or_given_twice(datasets, weights, row_len, seed, sizes):
    options = {"weights": weights, "row_len": row_len, "seed": seed, "source_seed": seed}
    whole = next(make(datasets, batch_size=sum(sizes), **options))
    state, batches = make(datasets, **options).state_dict(), []
    for size in sizes:
        mixture = make(datasets, batch_size=size, **options)
        mixture.load_state_dict(json.loads(json.dumps(state)))
        batches.append(next(mixture))
        state = mixture.state_dict()
    for field in ("tokens", "targets", "positions"):
        assert torch.equal(torch.cat([getattr(batch, field) for batch in batches]), getattr(whole, field))


def test_an_interrupted_batch_is_given_again(datasets, monkeypatch):
    mixture, whole = make(datasets), make(datasets)
    source = mixture.sources["b"]
    read_row = source.read_row
    calls = itertools.count()

    def interrupted(cursor):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return read_row(cursor)

    monkeypatch.setattr(source, "read_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(itertools.islice(mixture, 5))
    mixture_state = mixture.state_dict()
    for _ in range(mixture_state["row"] // 8):
        next(whole)
    assert mixture_state == whole.state_dict()
    assert torch.equal(next(mixture).tokens, next(whole).tokens)


def test_a_cursor_of_another_mixture_is_refused_and_changes_nothing(datasets):
    mixture = make(datasets)
    next(mixture)
    state = mixture.state_dict()
    for other, match in (
        (make(datasets, seed=4), "cursor is of another seed: 3, here 4"),
        (make(datasets, weights={**WEIGHTS, "a": 1.0}), "cursor is of another weights"),
        (make(datasets, row_len=32), "source 'a': cursor is of another row_len: 16, here 32"),
        (make(datasets, source_seed=9), "source 'a': cursor is of another seed: 0, here 9"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(state)
    fresh = make(datasets)
    before = fresh.state_dict()
    broken = {**state, "sources": {**state["sources"], "c": {**state["sources"]["c"], "span": 10**6}}}
    with pytest.raises(ValueError, match="source 'c': cursor: span 1000000"):
        fresh.load_state_dict(broken)
    with pytest.raises(ValueError, match="sources must be a mapping"):
        fresh.load_state_dict({**state, "sources": {}})
    assert fresh.state_dict() == before


def test_wrong_arguments(datasets, real_dataset):
    a, b = (PackedDataset(datasets[name], row_len=16, batch_size=1) for name in "ab")
    long = PackedDataset(datasets["b"], row_len=17, batch_size=1)
    foreign = PackedDataset(real_dataset, row_len=16, batch_size=1)
    for sources, weights, match in (
        ({}, {}, "must name the same datasets"),
        ({"a": a}, {"b": 1}, r"\['a'\] and weights \['b'\]"),
        ({"a": a, "b": b}, {"a": 1, "b": 0}, "weight of 'b' must be positive and finite, not 0"),
        ({"a": a, "b": b}, {"a": 1, "b": np.inf}, "not inf"),
        ({"a": a, "b": b}, {"a": 1, "b": float("nan")}, "not nan"),
        ({"a": a, "b": long}, {"a": 1, "b": 1}, "share one row_len, not {'a': 16, 'b': 17}"),
        ({"a": a, "b": foreign}, {"a": 1, "b": 1}, "share one tokenizer"),
        ({"a": a, "b": a}, {"a": 1, "b": 1}, "share a cursor"),
    ):
        with pytest.raises(ValueError, match=match):
            Mixture(sources, weights, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Mixture({"a": a}, {"a": 1}, batch_size=0)
