"""Text as its tokens come: the same as all of it decoded at once, whatever stops it."""

from __future__ import annotations

import random

import pytest

from llmcore.inference.text import TextStream
from llmcore.tokenizers import train_tokenizer
from llmcore.tokenizers.gguf import tokenizer_from_gguf


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    return train_tokenizer([], kind="byte") if request.param == "bytes" else sentencepiece()


def sentencepiece():
    import numpy as np

    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]),
        }
    ).tokenizer


@pytest.mark.parametrize("mark", ["</s>", "<s>"])
def test_special_tokens_that_are_shown(mark):
    tokenizer = sentencepiece()
    ids = tokenizer.encode("a ab é")
    shown, hidden = (tokenizer.special_tokens[name] for name in (mark, "<s>" if mark == "</s>" else "</s>"))
    ids = [hidden, *ids[:3], shown, *ids[3:], hidden, shown]
    stream = TextStream(tokenizer, shown=[shown])
    text = "".join([*map(stream.feed, ids), stream.finish()])
    assert text == tokenizer.decode([i for i in ids if i != hidden])
    assert text.count(mark) == 2


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    return [*map(stream.feed, ids), stream.finish()], stream


@pytest.mark.parametrize("seed", range(20))
def test_pieces_add_up_to_the_whole(seed, tokenizer):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab é你🤗 \n") for _ in range(200))
    ids = tokenizer.encode(text)
    shown, stream = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert sum(map(bool, shown)) > len(text) / 2  # it did not wait for the end
    assert not any("\ufffd" in piece for piece in shown)
    assert not stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_stray_bytes_add_up_too(seed):
    tokenizer = train_tokenizer([], kind="byte")
    ids = random.Random(seed).choices(range(256), k=300)
    shown, _ = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "stopped"),
    [
        ("hello END more", ["END"], "hello ", True),
        ("hello EN", ["END"], "hello EN", False),
        ("EEEEND", ["END"], "EEE", True),
        ("ababac!", ["abac"], "ab", True),
        ("a é b", ["é"], "a ", True),
        ("one two three", ["three", "two"], "one ", True),
        ("xyz", ["yz", "xyz"], "", True),
        ("STOP", ["STOP"], "", True),
        ("", ["STOP"], "", False),
    ],
)
def test_stop_strings(text, stop, wanted, stopped):
    tokenizer = train_tokenizer([], kind="byte")
    shown, stream = pieces(tokenizer, tokenizer.encode(text), stop)
    assert "".join(shown) == wanted
    assert stream.stopped == stopped


def test_a_beginning_of_a_stop_string_waits():
    tokenizer = train_tokenizer([], kind="byte")
    shown, _ = pieces(tokenizer, tokenizer.encode("aENbEND"), ["END"])
    assert shown == ["a", "", "", "ENb", "", "", "", ""]


def test_special_tokens_and_ids_without_a_token_are_no_text():
    tokenizer = train_tokenizer([], kind="byte")
    ids = [*tokenizer.encode("a"), tokenizer.eos_id, tokenizer.vocab_size + 5, *tokenizer.encode("b")]
    assert "".join(pieces(tokenizer, ids)[0]) == "ab"


def test_text_of_a_token_is_its_text_anywhere(tokenizer):
    """Where it says so at all; "" for an id without a token."""
    assert tokenizer.text_of(10**6) == ""
    ids = tokenizer.encode("ab é你 a")
    for at, index in enumerate(ids):
        if (text := tokenizer.text_of(index)) is not None:
            assert tokenizer.decode(ids[: at + 1]) == tokenizer.decode(ids[:at]) + text
    assert any(tokenizer.text_of(index) for index in ids) == tokenizer.is_byte_level
