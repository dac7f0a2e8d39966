"""Tokenizers in GGUF files: there and back, and token for token what llama.cpp makes of the same files."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
import tokenizers as library
import torch

from llmcore.checkpoints.gguf import GGUFFile
from llmcore.inference.save_gguf import save_gguf
from llmcore.models import Transformer, llama
from llmcore.tokenizers import Tokenizer, train_tokenizer
from llmcore.tokenizers.gguf import PRE_TOKENIZERS, _pairs, tokenizer_from_gguf
from llmcore.tokenizers.gguf_export import tokenizer_to_gguf

TEXT = [
    "The quick brown fox can't jump over 1234567 lazy dogs; I'LL see.\n\n\tdef f(x):\n        return x ** 2  # no\n",
    "Déjà vu: naïve façade ÀÉÎ. 你好，世界。こんにちは。 안녕하세요 Привет, мир! HelloWorld XMLHttp 3.14\r\n",
]
POOLS = [
    "abc XYZ 0123", "  \n\t\r", "'s't're'LL'M", "你好世界こんにちは", "éàüßñÀÉ", "🤗🇩🇪", "!?.,;:()[]{}$+<=>^~|`",
    "٣½Ⅷ²", "Привет", "\u00a0\u3000",
]  # fmt: skip


def strings(seed, count=150):
    rng = random.Random(seed)
    made = ["".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randrange(1, 40))) for _ in range(count)]
    return [*TEXT, " ", "\n", "   lead", "tail   ", "a  b", *made]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXT * 20, vocab_size=700, chat_template="{{ messages[0].content }}")


@pytest.fixture(scope="module")
def spm():
    """SentencePiece's form: pieces with scores, bytes for what has none."""
    trainer = library.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        limit_alphabet=80, show_progress=False,
    )  # fmt: skip
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT * 20, trainer)
    data = json.loads(trained.to_str())["model"]
    tokens = [token for token, _ in sorted(data["vocab"].items(), key=lambda item: item[1])]
    ranks = {"".join(merge): -float(rank) for rank, merge in enumerate(data["merges"])}
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([ranks.get(token, -1e6) for token in tokens], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
    }  # fmt: skip
    return metadata


def to_arrays(metadata):
    """As the reader gives them: numbers as arrays."""
    return {
        name: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for name, value in metadata.items()
    }


def in_llama_cpp(tokenizer, path, **changes):
    """llama.cpp with this vocabulary."""
    llama_cpp = pytest.importorskip("llama_cpp")
    torch.manual_seed(0)
    save_gguf(Transformer(llama("tiny", vocab_size=tokenizer.vocab_size)), tokenizer, path)
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def same_as(theirs, tokenizer, seed=0, special=False):
    for text in strings(seed):
        ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
        assert tokenizer.encode(text, allow_special=special) == ids, repr(text)
    assert theirs.tokenize(b"a b", add_bos=True)[: tokenizer.adds_bos] == [tokenizer.bos_id][: tokenizer.adds_bos]


def test_there_and_back(bpe):
    metadata = to_arrays(tokenizer_to_gguf(bpe, stop_ids=[bpe.eos_id], vocab_size=720))
    again = tokenizer_from_gguf(metadata)
    assert len(metadata["tokenizer.ggml.tokens"]) == 720
    assert again.tokenizer.chat_template == bpe.chat_template
    assert again.stop_ids == {bpe.eos_id, bpe.special_tokens["<|im_end|>"]}
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(again.tokenizer, f"{role}_token") == getattr(bpe, f"{role}_token")
    for text in strings(1):
        ids = bpe.encode(text)
        assert again.tokenizer.encode(text) == ids
        assert again.tokenizer.decode(ids) == text
    special = "a <|endoftext|> b"
    assert again.tokenizer.encode(special, allow_special=True) == bpe.encode(special, allow_special=True)


def test_sentencepiece_there_and_back(spm):
    one = tokenizer_from_gguf(spm).tokenizer
    two = tokenizer_from_gguf(to_arrays(tokenizer_to_gguf(one))).tokenizer
    assert one.adds_bos
    assert two.adds_bos
    for text in strings(2):
        ids = one.encode(text)
        assert two.encode(text) == ids
        assert one.decode(ids) == text
    assert one.encode("ab 🤗", add_bos=True)[0] == 1


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_made_of_parts_it_is_what_its_json_gives(kind, request):
    """The library takes vocabulary and merges without JSON, and two tokenizers share one model."""
    made = request.getfixturevalue(kind)
    one = tokenizer_from_gguf(to_arrays(tokenizer_to_gguf(made)) if kind == "bpe" else made).tokenizer
    two = Tokenizer(one.to_json(), **one._roles())
    assert json.loads(one.to_json()) == json.loads(two.to_json())
    assert (one.fingerprint, one.vocab_size, one.special_tokens) == (
        two.fingerprint,
        two.vocab_size,
        two.special_tokens,
    )
    texts = [*strings(5), "a <|endoftext|> b <s> <unk>", "x" * 5000]
    for special in (True, False, True):  # neither is changed by the other
        ids = [one.encode(text, allow_special=special) for text in texts]
        assert ids == one.encode_batch(texts, allow_special=special) == two.encode_batch(texts, allow_special=special)
    assert pickle.loads(pickle.dumps(one)).encode(texts[0]) == one.encode(texts[0])


def test_an_added_token_elsewhere_in_the_vocabulary(bpe):
    data = json.loads(bpe.to_json())
    data["model"]["merges"] = [tuple(merge) for merge in data["model"]["merges"]]
    assert Tokenizer(data).encode(TEXT[0]) == bpe.encode(TEXT[0])
    data["added_tokens"][0]["id"] += 1
    with pytest.raises(ValueError, match=r"added token .* has id"):
        Tokenizer(data)


def test_merges_of_pieces_that_begin_with_a_space():
    assert _pairs(["a b", "c d"]) == [("a", "b"), ("c", "d")]
    assert _pairs(["a b", "  b", " a b"]) == [("a", "b"), (" ", "b"), (" a", "b")]
    for wrong in ("ab", "a ", " a"):
        with pytest.raises(ValueError, match="two pieces with a space between"):
            _pairs(["a b", wrong])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_that_of_llama_cpp(prefix, spm, tmp_path):
    tokenizer = tokenizer_from_gguf(spm | {"tokenizer.ggml.add_space_prefix": prefix}).tokenizer
    same_as(in_llama_cpp(tokenizer, tmp_path / "a.gguf"), tokenizer, seed=3)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_those_of_llama_cpp(name, bpe, tmp_path):
    metadata = to_arrays(tokenizer_to_gguf(bpe)) | {"tokenizer.ggml.pre": name}
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_gguf(metadata).tokenizer
    theirs = in_llama_cpp(tokenizer, tmp_path / "a.gguf")
    written = GGUFFile(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"]
    assert PRE_TOKENIZERS[written].patterns == PRE_TOKENIZERS[name].patterns
    same_as(theirs, tokenizer, seed=4)


def test_special_tokens_are_those_of_llama_cpp(bpe, tmp_path):
    theirs = in_llama_cpp(bpe, tmp_path / "a.gguf")
    for text in ("a<|endoftext|>b", "<|endoftext|>", "<|endoftext|><|endoftext|> x", "<|endoftext"):
        for special in (False, True):
            ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert bpe.encode(text, allow_special=special) == ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; accepted: 'gpt2', 'llama'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "grok-3"}, "tokenizer.ggml.pre is 'grok-3'; accepted: "),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or no list of texts"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        ({"token_type": np.ones(3, dtype=np.int32)}, r"tokenizer.ggml.token_type is no list of \d+ numbers"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges holds 'ab'; accepted: two pieces with a space between"),
        ({"merges": ["a qqqq"]}, "."),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000; accepted: 0 to"),
        ({"bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'"),
    ],
    ids=str,
)
def test_refuses(changes, message, bpe):
    metadata = to_arrays(tokenizer_to_gguf(bpe)) | {f"tokenizer.ggml.{name}": v for name, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf({name: value for name, value in metadata.items() if value is not None})


def test_refuses_to_write_what_the_form_lacks(bpe):
    for kind in ("unigram", "word"):
        with pytest.raises(ValueError, match="has no form in GGUF files; accepted: BPE with merges"):
            tokenizer_to_gguf(train_tokenizer(TEXT, kind=kind, vocab_size=400))
    data = json.loads(bpe.to_json())
    data["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(ValueError, match=r"the pre-tokenizer .* has no name in GGUF files"):
        tokenizer_to_gguf(Tokenizer(json.dumps(data)))
