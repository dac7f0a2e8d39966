"""Tokenizers from the metadata of GGUF files, brought into the form of a `tokenizer.json`.

Two kinds are read: "gpt2", byte-level BPE whose pre-tokenizer the file names ("llama-bpe", "qwen2", ...), and "llama",
SentencePiece's BPE: pieces with scores, spaces as "▁", bytes for what has no piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tokenizer import ROLES, Tokenizer

# the numbers in tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # its hole: how many digits go together
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (  # its holes: what may end a word, and how many digits go together
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before merges: by each pattern in turn, matches and what is between them.

    Attributes:
        patterns: regular expressions.
        whole_words: a word that is a token needs no merges.
        add_bos: whether a text begins with the BOS token where the file doesn't say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_KINDS = {
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-v2-es", "jina-v2-de", "gigachat", "mellum", "modern-bert"):
        PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"):
        PreTokenizer((r"\p{N}", _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        PreTokenizer((_WORDS % "{1,3}",), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): PreTokenizer((_WORDS % "{1,3}",)),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"): PreTokenizer((_WORDS % "",)),
    ("tekken",): PreTokenizer((_CASES % ("", "", ""),), whole_words=True, add_bos=True),
    ("gpt-4o", "llama4"): PreTokenizer((_CASES % (f"{_CASELESS}?", f"{_CASELESS}?", "{1,3}"),)),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("deepseek-v3", "hunyuan-dense"): PreTokenizer((
        r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}  # fmt: skip
PRE_TOKENIZERS = {name: kind for names, kind in _KINDS.items() for name in names}

# Control tokens that end a turn or a text, by their spelling: a file names one as EOS, and its model writes the others.
_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>",
    "<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


@dataclass(frozen=True)
class GGUFVocabulary:
    """tokenizer, whose `adds_bos` is as the file says; stop_ids: what ends a text or a turn."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """The tokenizer that a file's metadata describe, with its chat template.

    Raises:
        ValueError: naming the entry, for an unknown kind or pre-tokenizer, or entries that contradict each other.
    """
    kind = _text(metadata, "model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; accepted: 'gpt2', 'llama'")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing or no list of texts")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"tokenizer.ggml.tokens holds {twice!r} twice")
    ids = _ids(metadata, len(tokens), kind)
    types = _numbers(metadata, "token_type", len(tokens))
    if types is None:
        special = {ids[name] for name in ("bos", "eos", "eot", "eom") if name in ids}
        types = [_CONTROL if index in special else _NORMAL for index in range(len(tokens))]
    if kind == "gpt2":
        model, default_bos = _byte_level(metadata, vocab)
    else:
        model, default_bos = _sentencepiece(metadata, tokens, vocab, types, ids.get("unk")), True
    model["added_tokens"] = [
        {
            "id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[index] != _USER_DEFINED,
        }
        for index in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    ]  # fmt: skip
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", default_bos) and "bos" in ids
    model["post_processor"] = _begins_with(tokens[ids["bos"]], ids["bos"]) if add_bos else None
    tokenizer = Tokenizer(
        {"version": "1.0", **model},
        **{f"{role}_token": tokens[ids[role]] for role in ROLES if role in ids},
        chat_template=_text(metadata, "tokenizer.chat_template", prefix=""),
    )
    return GGUFVocabulary(tokenizer, _stop_ids(ids, vocab, types))


def _begins_with(token: str, index: int) -> dict[str, Any]:
    """The post-processor that puts a token before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": type_}} for type_, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing", "single": [first, texts[0]], "pair": [first, *texts],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }  # fmt: skip


def _text(metadata: Mapping[str, Any], name: str, prefix: str = "tokenizer.ggml.") -> str | None:
    value = metadata.get(prefix + name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{prefix + name} is {value!r}; accepted: text")
    return value


def _numbers(metadata: Mapping[str, Any], name: str, count: int) -> list[Any] | None:
    """An entry with a number for each token, or None."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    if not hasattr(values, "tolist") or len(values) != count:
        raise ValueError(f"tokenizer.ggml.{name} is no list of {count} numbers, one for each token")
    return values.tolist()


def _ids(metadata: Mapping[str, Any], count: int, kind: str) -> dict[str, int]:
    """The ids of the tokens that play a role."""
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    defaults = {"unk": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    ids = {}
    for role, name in names.items():
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(role))
        if value is None or value == 2**32 - 1:  # a file's way to say that there is none
            continue
        if not isinstance(value, int) or not 0 <= value < count:
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {value!r}; accepted: 0 to {count - 1}")
        ids[role] = value
    return ids


def _stop_ids(ids: Mapping[str, int], vocab: Mapping[str, int], types: Sequence[int]) -> frozenset[int]:
    ends = {vocab[text] for text in _ENDS if text in vocab and types[vocab[text]] == _CONTROL}
    if {"<|return|>", "<|call|>"} <= vocab.keys():  # gpt-oss, where <|end|> is between the parts of one answer
        ends -= {vocab.get("<|end|>")}
    return frozenset(ends | {ids[role] for role in ("eos", "eot", "eom") if role in ids})


def _byte_level(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[dict[str, Any], bool]:
    name = _text(metadata, "pre") or "default"
    if (kind := PRE_TOKENIZERS.get(name)) is None:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; accepted: {', '.join(sorted(PRE_TOKENIZERS))}")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError("tokenizer.ggml.merges is missing or no list of texts")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in kind.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": kind.whole_words,
            "vocab": vocab, "merges": _pairs(merges),
        },
    }, kind.add_bos  # fmt: skip


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if set(map(len, pairs)) == {2} and all(map(all, pairs)):
        return pairs
    return [_pair(merge) for merge in merges]  # three times as long: one begins with a space, or is wrong


def _pair(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)  # the left one may be a space itself
    if at < 0 or at == len(merge) - 1:
        raise ValueError(f"tokenizer.ggml.merges holds {merge!r}; accepted: two pieces with a space between")
    return merge[:at], merge[at + 1 :]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocab: Mapping[str, int], types: Sequence[int], unk: int | None
) -> dict[str, Any]:
    scores = _numbers(metadata, "scores", len(tokens))
    if scores is None:
        raise ValueError("tokenizer.ggml.scores is missing")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *after,
    ]  # fmt: skip
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None if unk is None else tokens[unk],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": vocab, "merges": _merges(tokens, vocab, types, scores),
        },
    }  # fmt: skip


def _merges(
    tokens: Sequence[str], vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every two pieces that make a third, the one of the highest score first."""
    pieces = [i for i, type_ in enumerate(types) if type_ in (_NORMAL, _USER_DEFINED, _UNUSED)]
    known = {tokens[i] for i in pieces}
    pieces.sort(key=lambda i: (-scores[i], i))
    return [
        (token[:at], token[at:])
        for token in (tokens[i] for i in pieces)
        for at in range(1, len(token)) if token[:at] in known and token[at:] in known
    ]  # fmt: skip
