"""Tokenizers as the metadata of GGUF files: the other way of `llmcore.tokenizers.gguf`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .gguf import _BYTE, _CONTROL, _GPT2, _NORMAL, _UNKNOWN, _UNUSED, _USER_DEFINED, PRE_TOKENIZERS
from .tokenizer import Tokenizer


def tokenizer_to_gguf(tokenizer: Tokenizer, stop_ids: Collection[int] = (), vocab_size: int = 0) -> dict[str, Any]:
    """The metadata that describe a tokenizer.

    Args:
        stop_ids: what ends a text; the form has room for the EOS token and one more.
        vocab_size: rows of the model's embeddings; ids without a token are marked as unused.

    Raises:
        ValueError: for a tokenizer that the form has no words for: it has byte-level BPE with a known pre-tokenizer
            and SentencePiece's BPE.
    """
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("merges"):
        raise ValueError(f"a {model.get('type')} tokenizer has no form in GGUF files; accepted: BPE with merges")
    by_id = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in data.get("added_tokens") or []}
    by_id |= {index: token["content"] for index, token in added.items()}
    count = max(vocab_size, tokenizer.vocab_size)
    values: dict[str, Any] = {
        "tokens": [by_id.get(index, f"[PAD{index}]") for index in range(count)],
        "token_type": [_type(index, by_id, added, model) for index in range(count)],
        "add_bos_token": tokenizer.adds_bos,
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        values |= _sentencepiece(data, merges, values["tokens"])
    else:
        values |= {"model": "gpt2", "pre": _pre_tokenizer(data), "merges": merges}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := getattr(tokenizer, f"{role}_id")) is not None:
            values[f"{name}_token_id"] = index
    if others := sorted(set(stop_ids) - {tokenizer.eos_id}):
        values["eot_token_id"] = others[0]
    result = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    if tokenizer.chat_template is not None:
        result["tokenizer.chat_template"] = tokenizer.chat_template
    return result


def _type(
    index: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]
) -> int:
    if index not in by_id:
        return _UNUSED
    if by_id[index] == model.get("unk_token"):
        return _UNKNOWN
    if index in added:
        return _CONTROL if added[index]["special"] else _USER_DEFINED
    byte = model.get("byte_fallback") and len(by_id[index]) == 6 and by_id[index].startswith("<0x")
    return _BYTE if byte else _NORMAL


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """The name of the pre-tokenizer that does the same."""
    given = data.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    patterns = tuple(_patterns(steps)) if data.get("normalizer") is None else None
    whole_words = bool(data["model"].get("ignore_merges"))
    for name, kind in PRE_TOKENIZERS.items():
        if kind.patterns == patterns and kind.whole_words == whole_words:
            return name
    raise ValueError(f"the pre-tokenizer {given!r} has no name in GGUF files; accepted: {', '.join(PRE_TOKENIZERS)}")


def _patterns(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The regular expressions of the steps; of any other step one that is nobody's."""
    found: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits" and step["individual_digits"]:
            found.append(r"\p{N}")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            found += [_GPT2] if step.get("use_regex", True) else []
        else:
            found.append(f"unknown: {kind}")
    return found


def _sentencepiece(data: Mapping[str, Any], merges: Sequence[str], tokens: Sequence[str]) -> dict[str, Any]:
    """Scores that fall in the order of the merges."""
    normalizer = json.dumps(data.get("normalizer"), ensure_ascii=False)
    if data.get("pre_tokenizer") is not None or "Replace" not in normalizer or "▁" not in normalizer:
        raise ValueError(f"the normalizer {normalizer} has no form in GGUF files; accepted: spaces as '▁'")
    score: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        score.setdefault(merge.replace(" ", ""), -float(rank))
    return {
        "model": "llama", "scores": [score.get(token, -float(len(merges))) for token in tokens],
        "add_space_prefix": "Prepend" in normalizer,
    }  # fmt: skip
