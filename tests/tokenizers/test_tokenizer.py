from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle

import pytest
import tokenizers

from llmcore.tokenizers import Tokenizer, train_tokenizer
from llmcore.tokenizers._atomic import write_atomic

KINDS = ("bpe", "unigram", "word", "byte")
SAMPLE = "def f(x):\r\n\treturn x ** 2  # ½ 😀\n\n   12345 <|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_folder(trained, texts, tmp_path, kind):
    tokenizer = copy.copy(trained[kind])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save(tmp_path / "folder")
    loaded = Tokenizer.load(tmp_path / "folder")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.chat_template == tokenizer.chat_template
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(loaded, f"{role}_id") == getattr(tokenizer, f"{role}_id")
    assert loaded.encode_batch([*texts[:3], SAMPLE]) == tokenizer.encode_batch([*texts[:3], SAMPLE])
    assert sorted(os.listdir(tmp_path / "folder")) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_file_loads_in_the_plain_library_with_the_same_ids(trained, texts, tmp_path, kind):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts[:5]:
        assert plain.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert plain.encode(SAMPLE, add_special_tokens=False).ids == tokenizer.encode(SAMPLE, allow_special=True)
    assert plain.get_vocab_size() == tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_loads_in_transformers_with_the_same_ids(trained, texts, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained[kind]
    tokenizer.save(tmp_path)
    for loader in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        for role in ("bos", "eos", "pad", "unk"):
            assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")
        for text in [*texts[:3], SAMPLE, " don't , stop .", ""]:
            ids = tokenizer.encode(text, allow_special=True)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == tokenizer.decode(ids)


def test_a_save_that_was_cut_short_leaves_no_tokenizer(trained, tmp_path, monkeypatch):
    written = []

    def write_one(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_atomic(path, content)

    monkeypatch.setattr("llmcore.tokenizers.tokenizer.write_atomic", write_one)
    with pytest.raises(KeyboardInterrupt):
        trained["bpe"].save(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path)


def test_lone_file_finds_conventional_special_tokens(trained, tmp_path):
    trained["bpe"].save(tmp_path / "deep" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "deep" / "tokenizer.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1024 - 5, 1024 - 4, 1024 - 3)
    assert loaded.unk_id is None


def test_config_in_the_forms_other_libraries_write(trained, tmp_path):
    trained["byte"].save(tmp_path)
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None}
    config["chat_template"] = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_token, loaded.bos_id, loaded.chat_template) == ("<|im_end|>", None, "a")
    (tmp_path / "chat_template.jinja").write_text("c")
    assert Tokenizer.load(tmp_path).chat_template == "c"


def test_truncation_and_padding_in_a_file_do_not_lose_text(trained, tmp_path):
    trained["byte"].save(tmp_path / "t.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    library.enable_truncation(4)
    library.enable_padding(length=128)
    library.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode("0123456789") == list(b"0123456789")


def test_vocab_size_covers_unused_ids():
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 7}, "unk_token": "a"}
    tokenizer = Tokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert tokenizer.vocab_size == 8
    assert tokenizer.id_to_token(3) is None
    with pytest.raises(ValueError, match="token id 3 has no token"):
        tokenizer.decode([0, 3])


def test_decode(trained):
    tokenizer = trained["byte"]
    ids = [*tokenizer.encode("hé", add_bos=True, add_eos=True), 0xFF]
    assert tokenizer.decode(ids) == "<|bos|>hé<|endoftext|>\ufffd"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hé\ufffd"
    for bad in (-1, 261, 2**40):
        with pytest.raises(ValueError, match=f"token id {bad} has no token"):
            tokenizer.decode([bad])
    with pytest.raises(TypeError, match="float"):
        tokenizer.decode([97.5])


def test_encode_refuses_what_it_cannot_do(trained):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        trained["bpe"].encode("ab\udc80")
    with pytest.raises(TypeError, match="must be str, not bytes"):
        trained["bpe"].encode(b"ab")
    bare = train_tokenizer([], kind="byte", bos_token=None)
    with pytest.raises(ValueError, match="no bos_token"):
        bare.encode("a", add_bos=True)


def test_copies_keep_special_tokens_out_of_text(trained):
    for clone in (pickle.loads(pickle.dumps(trained["bpe"])), copy.deepcopy(trained["bpe"])):
        assert clone.encode(SAMPLE) == trained["bpe"].encode(SAMPLE)
        assert clone.fingerprint == trained["bpe"].fingerprint


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": 3}'])
def test_wrong_files(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(file)


def test_every_truncation_is_refused(trained, tmp_path):
    trained["byte"].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("wrong", [0, -1, "x", [], {}, None, [None], {"type": "Nonsense"}, {"type": "BPE"}])
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_wrong_types_load_or_are_refused(trained, tmp_path, kind, wrong):
    """Whatever stands at any place of the file, loading gives a tokenizer or one ValueError: no panic, no crash."""
    trained[kind].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    places = [(data, key) for key in data] + [(data["model"], key) for key in data["model"]]
    for holder, key in places:
        before = holder[key]
        holder[key] = wrong
        file.write_text(json.dumps(data))
        holder[key] = before
        with contextlib.suppress(ValueError):
            Tokenizer.load(tmp_path).encode(SAMPLE)


def test_merges_that_would_abort_the_library(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="lacks the continuing_subword_prefix '##'"):
        Tokenizer.load(tmp_path)


def test_missing_and_unusable_files(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer file at"):
        Tokenizer.load(tmp_path)
    trained["byte"].save(tmp_path)
    for config, reason in (
        ("[]", "tokenizer_config.json is not a usable"),
        ('{"bos_token": 3}', "bos_token must be text, not 3"),
        ('{"bos_token": "<nope>"}', "'<nope>' is not in the vocabulary"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=reason):
            Tokenizer.load(tmp_path)
