from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.tokenizers import train_tokenizer
from llmcore.tokenizers.train import byte_alphabet

EXACT = ("bpe", "unigram", "byte")


@pytest.mark.parametrize("kind", EXACT)
def test_round_trip_of_real_text(trained, texts, kind):
    tokenizer = trained[kind]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
@example("\x00\x01\x1f\x7f\x85\u2028\ufeff")
@example("\r")
@example("\r\r\n\n\r")
@example("   leading and trailing   ")
@example("👩‍👩‍👧‍👦 é e\u0301 \U0010ffff")
@example("<|endoftext|><|im_start|>")
@example("12345678901234567890")
def test_round_trip_of_any_text(trained, text):
    for kind in EXACT:
        tokenizer = trained[kind]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, kind
        assert not set(ids) & set(tokenizer.special_tokens.values()), kind


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_compresses_and_repeats(trained, texts, kind):
    tokenizer = trained[kind]
    sample = texts[0]
    assert len(tokenizer.encode(sample)) < 0.6 * len(sample.encode())
    again = train_tokenizer(iter(texts), kind=kind, vocab_size=tokenizer.vocab_size)
    assert again.fingerprint == tokenizer.fingerprint


def test_vocab_size_counts_everything(trained):
    for kind, size in (("bpe", 1024), ("unigram", 600), ("word", 1024)):
        assert trained[kind].vocab_size == size
        assert len({trained[kind].id_to_token(index) for index in range(size)} - {None}) == size
    assert trained["byte"].vocab_size == 256 + len(trained["byte"].special_tokens)


def test_byte_ids_are_byte_values(trained):
    text = "".join(map(chr, range(300)))
    assert trained["byte"].encode(text) == list(text.encode("utf-8"))
    assert len(set(byte_alphabet())) == 256


def test_digits_come_in_groups_of_at_most_three(texts):
    tokenizer = train_tokenizer(["20240131 " * 500], kind="bpe", vocab_size=400)
    assert all(sum(c.isdigit() for c in tokenizer.id_to_token(i)) <= 3 for i in tokenizer.encode("2024013120240131"))


def test_words(trained):
    tokenizer = trained["word"]
    ids = tokenizer.encode("def return zyzzyva(")
    assert tokenizer.unk_id in ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["def", "return", "<|unk|>", "("]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def return ("


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "byte"])
def test_special_tokens_in_text_stay_text(trained, kind):
    tokenizer = trained[kind]
    text = "a<|endoftext|>b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.encode(text, allow_special=True).count(tokenizer.eos_id) == 1
    assert tokenizer.encode("a", add_bos=True, add_eos=True)[0] == tokenizer.bos_id
    assert tokenizer.encode("a", add_bos=True, add_eos=True)[-1] == tokenizer.eos_id


def test_a_special_token_spelled_all_over_the_corpus_is_never_learnt_as_one():
    tokenizer = train_tokenizer(["x <|endoftext|> y"] * 1000, kind="bpe", vocab_size=400)
    assert tokenizer.eos_id not in tokenizer.encode("x <|endoftext|> y<|endoftext|>")


def test_a_special_token_that_is_also_a_word_is_refused():
    with pytest.raises(ValueError, match="'stop' is also ordinary text"):
        train_tokenizer(["stop stop stop"] * 10, kind="bpe", vocab_size=400, eos_token="stop")
    with pytest.raises(ValueError, match="would decode as"):
        train_tokenizer(["stop"], kind="bpe", vocab_size=400, eos_token="<|début|>")


@pytest.mark.parametrize(("kind", "smallest"), [("bpe", 261), ("unigram", 262), ("word", 7)])
def test_too_small_a_vocabulary_names_the_minimum(texts, kind, smallest):
    with pytest.raises(ValueError, match=f"needs at least {smallest}"):
        train_tokenizer(texts, kind=kind, vocab_size=smallest - 1)
    assert train_tokenizer(texts, kind=kind, vocab_size=smallest).vocab_size == smallest


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_too_large_a_vocabulary_names_the_maximum(texts, kind):
    with pytest.raises(ValueError, match="vocab_size is 10000000000; accepted: at most 16777216"):
        train_tokenizer(texts, kind=kind, vocab_size=10**10)


def test_long_words_are_cut_in_training_alone():
    """Trainers take time quadratic in the length of a word; what they learn of a part is enough."""
    whole = train_tokenizer(["a" * 2560], kind="bpe", vocab_size=300)
    parts = train_tokenizer([" ".join(["a" * 256] * 10)], kind="bpe", vocab_size=300)
    assert max(len(whole.id_to_token(i)) for i in range(256, 290) if whole.id_to_token(i)) == 256
    assert whole.encode("a" * 256) == parts.encode("a" * 256)
    assert len(whole.encode("a" * 257)) == 2


def test_bad_arguments(texts):
    with pytest.raises(ValueError, match="bpe, unigram, word, byte"):
        train_tokenizer(texts, kind="wordpiece", vocab_size=500)
    with pytest.raises(ValueError, match="has vocab_size 261"):
        train_tokenizer([], kind="byte", vocab_size=300)
    with pytest.raises(TypeError, match="not one text"):
        train_tokenizer("abc", vocab_size=500)
    with pytest.raises(TypeError, match="special_tokens must be a sequence of texts"):
        train_tokenizer(texts, vocab_size=500, special_tokens="<|x|>")
    with pytest.raises(ValueError, match="min_frequency must be at least 0, not -1"):
        train_tokenizer(texts, vocab_size=500, min_frequency=-1)
    with pytest.raises(TypeError, match="not int"):
        train_tokenizer([1], vocab_size=500)
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        train_tokenizer(["a\ud800"], vocab_size=500)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_no_text(kind):
    with pytest.raises(ValueError, match="no text to train on"):
        train_tokenizer(["", ""], kind=kind, vocab_size=500)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tiny_corpus_gives_a_small_but_whole_vocabulary(kind):
    tokenizer = train_tokenizer(["a"], kind=kind, vocab_size=5000)
    assert 261 <= tokenizer.vocab_size <= 5000
    assert tokenizer.decode(tokenizer.encode("anything 😀")) == "anything 😀"
