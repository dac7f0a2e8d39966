from __future__ import annotations

import pytest

from llmcore.data import Split, Texts, part_of


def test_parts_are_disjoint_and_whole(real_source):
    everything = [document.text for document in real_source]
    train = [document.text for document in Split(real_source, "train", 0.2)]
    held_out = [document.text for document in Split(real_source, "validation", 0.2)]
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(everything)


def test_fraction_and_salt():
    texts = [f"text {i}" for i in range(20_000)]
    for fraction in (0.01, 0.3):
        share = sum(part_of(text, fraction) == "validation" for text in texts) / len(texts)
        assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / len(texts)) ** 0.5
    assert [part_of(t, 0.5) for t in texts] != [part_of(t, 0.5, salt="other") for t in texts]


def test_a_larger_fraction_only_adds():
    small, large = ({t for t in map(str, range(5000)) if part_of(t, f) == "validation"} for f in (0.1, 0.2))
    assert small < large


def test_copies_go_together_wherever_they_stand():
    texts = [f"text {i}" for i in range(50)]
    held_out = {document.text for document in Split(Texts(texts * 2), "validation", 0.3)}
    train = {document.text for document in Split(Texts(texts[::-1]), "train", 0.3)}
    assert not held_out & train


def test_the_split_is_the_same_on_every_machine():
    # Pinned: a change here would move documents that earlier runs held out into training.
    assert "".join(part_of(f"document {i}", 0.5)[0] for i in range(16)) == "tvtttvtvvtttvvtv"


def test_skips_come_from_the_source():
    split = Split(Texts(["", *map(str, range(99))]), "train", 0.5)
    list(split)
    assert split.skips.counts == {"empty document": 1}


def test_wrong_arguments():
    source = Texts(["a"])
    with pytest.raises(ValueError, match="train, validation, not 'test'"):
        Split(source, "test", 0.1)
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Split(source, "train", fraction)
    part = part_of("a", 0.5)
    other = "train" if part == "validation" else "validation"
    with pytest.raises(ValueError, match=f"the {other} part .* holds no documents"):
        list(Split(source, other, 0.5))
    assert Split(source, "train", 0.1).fingerprint() != Split(source, "validation", 0.1).fingerprint()
