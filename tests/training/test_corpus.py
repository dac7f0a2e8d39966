from __future__ import annotations

import json
import random

import pytest

from llmcore.tokenizers import train_tokenizer
from llmcore.training.config import DataConfig, SourceConfig, TokenizerConfig
from llmcore.training.corpus import build_corpus, cut_if_few, read_source, token_bytes

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "it",
    "was",
    "flat",
    "but",
    "not",
    "fat",
    "at",
    "all",
]


def text(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=9)) + "\n" for _ in range(lines))


def build(tmp_path, sources, kind="byte", **data):
    config = DataConfig(sources=sources, **{"row_len": 32, "batch_rows": 2, "validation_fraction": 0.1, **data})
    tokenizer = TokenizerConfig(kind=kind, vocab_size=300)
    return build_corpus(config, tokenizer, tmp_path / "run", seed=0, say=lambda _: None)


def test_one_long_file_is_cut_so_that_some_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text(text(0, 400))
    source = cut_if_few(read_source(SourceConfig(path=str(tmp_path))), 0.1)
    pieces = [d.text for d in source]
    assert "".join(pieces) == text(0, 400)
    assert len(pieces) > 50
    corpus = build(tmp_path, [SourceConfig(path=str(tmp_path / "one.txt"))])
    held = corpus.validation_sets["0-one.txt"].num_tokens
    total = held + corpus.train_sets["0-one.txt"].num_tokens
    assert 0.02 < held / total < 0.25
    for batch in (next(corpus.loader), next(corpus.eval_batches())):
        assert batch.tokens.numel() == 64


def test_a_file_of_one_long_line_is_cut_too(tmp_path):
    content = text(0, 2000).replace("\n", " ")
    (tmp_path / "text8").write_text(content)
    source = cut_if_few(read_source(SourceConfig(path=str(tmp_path / "text8"))), 0.02)
    pieces = [d.text for d in source]
    assert "".join(pieces) == content
    assert all(piece.endswith(" ") for piece in pieces)
    corpus = build(tmp_path, [SourceConfig(path=str(tmp_path / "text8"))], validation_fraction=0.02)
    held = corpus.validation_sets["0-text8"].num_tokens
    assert 0 < held < 0.1 * corpus.train_sets["0-text8"].num_tokens


def test_many_documents_are_left_whole(tmp_path):
    with open(tmp_path / "many.jsonl", "w") as file:
        for i in range(200):
            file.write(json.dumps({"body": text(i, 2)}) + "\n")
    source = read_source(SourceConfig(path=str(tmp_path / "many.jsonl"), text_field="body"))
    assert cut_if_few(source, 0.1) is source


def test_the_tokenizer_sees_nothing_held_out(tmp_path):
    """A letter that only held-out documents hold ends up in no trained token."""
    from llmcore.data import part_of

    documents = [f"{text(i, 3)}" for i in range(300)]
    documents = [
        d.replace("cat", "qqq") if part_of(d.replace("cat", "qqq"), 0.1) == "validation" else d for d in documents
    ]
    with open(tmp_path / "many.jsonl", "w") as file:
        file.writelines(json.dumps({"text": d}) + "\n" for d in documents)
    corpus = build(tmp_path, [SourceConfig(path=str(tmp_path / "many.jsonl"))], kind="bpe")
    tokens = [corpus.tokenizer.id_to_token(i) for i in range(corpus.tokenizer.vocab_size)]
    assert sum("qqq" in d for d in documents) > 10
    assert not any("qq" in token for token in tokens)


def test_sources_are_mixed_and_each_is_evaluated(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text("".join(letter * (20 + i % 7) + f" {i}\n" for i in range(400)))
    sources = [SourceConfig(path=str(tmp_path / "a.txt"), weight=3.0), SourceConfig(path=str(tmp_path / "b.txt"))]
    corpus = build(tmp_path, sources, eval_batches=4)
    a, b = corpus.tokenizer.encode("ab")
    tokens = [next(corpus.loader).tokens for _ in range(100)]
    counts = [sum(int((t == letter).sum()) for t in tokens) for letter in (a, b)]
    assert 2 < counts[0] / counts[1] < 4.5
    batches = list(corpus.eval_batches())
    assert len(batches) == 4
    assert all(any((batch.tokens == letter).any() for batch in batches) for letter in (a, b))
    again = list(corpus.eval_batches())
    assert all((x.tokens == y.tokens).all() for x, y in zip(batches, again))


def test_a_finished_run_folder_needs_its_source_no_more(tmp_path):
    (tmp_path / "one.txt").write_text(text(0, 400))
    sources = [SourceConfig(path=str(tmp_path / "one.txt"))]
    first = next(build(tmp_path, sources).loader).tokens
    (tmp_path / "one.txt").unlink()
    assert (next(build(tmp_path, sources).loader).tokens == first).all()


def test_unusable_corpora_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(tmp_path, [SourceConfig(path=str(tmp_path / "nowhere"))])
    with pytest.raises(FileNotFoundError, match="~no-such-user/corpus does not exist"):
        read_source(SourceConfig(path="~no-such-user/corpus"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no documents"):
        build(tmp_path, [SourceConfig(path=str(tmp_path / "empty"))])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
def test_token_bytes_add_up_to_the_text(kind):
    words = [text(i, 5) for i in range(20)]
    tokenizer = train_tokenizer(words, kind=kind, vocab_size=None if kind == "byte" else 320)
    lengths = token_bytes(tokenizer)
    sentence = "the cat, 漢字 and é\n\n  sat"
    ids = tokenizer.encode(sentence, add_eos=True)
    assert int(lengths[ids].sum()) == len(sentence.encode())


def test_token_bytes_of_words_are_unknown():
    assert token_bytes(train_tokenizer([text(0, 50)], kind="word", vocab_size=20)) is None
