"""Structured output: texts that a JSON schema, a regular expression, a list of choices or a grammar allows.

A grammar and the text so far say which tokens may come next; all others get the logit -inf before the draw. The package
llguidance (an Earley parser over a lexer of derivatives) finds them, in microseconds for most tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llmcore.tokenizers import Tokenizer

MAX_SIZE = 1 << 16  # characters of a schema, expression, list of choices or grammar
# What llguidance may spend: on making its lexer; on the tokens allowed at one place (both in its units of work, of
# which it does 14 to 50 thousand a millisecond); and on what it keeps between places.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Matcher(Protocol):
    """Follows one text."""

    def allowed(self) -> Tensor:
        """Which tokens may come next: (vocab,) bool; none when nothing can be said any more."""

    def accept(self, token: int) -> bool:
        """Takes the next token in. Whether the text is complete: it can't go on, or the token ended it."""

    def fork(self) -> Matcher:
        """Another that has seen the same."""


class Constraint:
    """What a text must be: `JSONSchema`, `JSONObject`, `Regex`, `Choice` or `Grammar`."""

    def matcher(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> GrammarMatcher:
        """A matcher at the beginning of a text.

        It is compiled on the first call, which may take a second, and kept; compiling holds no lock of the interpreter.
        So call this, or `Engine.prepare`, in a thread of your own before the engine gets the request.

        Args:
            vocab_size: logits of a row; tokens that the tokenizer lacks are never allowed.
            stop_ids: tokens that end a text, allowed where it is complete; without any, the tokenizer's end of text.

        Raises:
            ValueError: for what is no schema, expression or grammar, uses what llguidance does not know, or is over one
                of the limits; and for a tokenizer whose tokens don't spell bytes.
            ImportError: without the package llguidance.
        """
        stops = tuple(sorted(stop_ids)) or tuple(i for i in [tokenizer.eos_id] if i is not None)
        key = (tokenizer, vocab_size, stops)
        known = self.__dict__.get("_compiled")
        if known is None or known[0] != key:
            known = (key, self._compile(tokenizer, vocab_size, stops))
            object.__setattr__(self, "_compiled", known)  # two threads may both compile; no harm comes of it
        return known[1].fork()

    def _compile(self, tokenizer: Tokenizer, vocab_size: int, stops: tuple[int, ...]) -> GrammarMatcher:
        library, what = _library(), type(self).__name__
        try:
            source = self._source()
            if len(source) > MAX_SIZE:
                raise ValueError(f"it has {len(source)} characters; accepted: at most {MAX_SIZE}")
            grammar = self._grammar(library, source)
            matcher = library.LLMatcher(
                _bridge(tokenizer, vocab_size, stops), grammar, log_level=0, limits=library.LLParserLimits(**LIMITS)
            )
            if not matcher.is_error():
                matcher.compute_bitmask()  # some are refused only here; and the first place is the dearest
            if matcher.is_error():
                raise ValueError(_first_lines(matcher.get_error()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"constraint {what}: {error}") from None
        return GrammarMatcher(matcher, vocab_size)

    def _source(self) -> str:
        raise NotImplementedError

    def _grammar(self, library: Any, source: str) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class JSONSchema(Constraint):
    """A JSON text of this schema (draft 2020-12, as far as llguidance goes: an unknown keyword is an error).

    Args:
        schema: parsed or as text; True for any JSON.
        whitespace: wherever JSON allows it. Without, there is one space after commas and colons, as Python writes it:
            models like to write line ends without end.
    """

    schema: Mapping[str, Any] | bool | str
    whitespace: bool = False

    def _source(self) -> str:
        schema = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
        if not isinstance(schema, (Mapping, bool)):
            raise ValueError(f"the schema is a {type(schema).__name__}; accepted: an object, or true")
        return json.dumps(schema, allow_nan=False)

    def _grammar(self, library: Any, source: str) -> str:
        style = {"whitespace_flexible": self.whitespace}
        if not self.whitespace:
            style |= {"item_separator": ", ", "key_separator": ": "}
        return library.LLMatcher.grammar_from_json_schema(source, overrides=style)


def JSONObject(whitespace: bool = False) -> JSONSchema:
    """Any JSON object."""
    return JSONSchema({"type": "object"}, whitespace)


@dataclass(frozen=True)
class Regex(Constraint):
    """A text that matches all of a regular expression (of Rust's crate regex: no look-around, no back references)."""

    pattern: str

    def _source(self) -> str:
        if not isinstance(self.pattern, str):
            raise TypeError(f"the pattern is {self.pattern!r}; accepted: a string")
        return _without_anchors(self.pattern)

    def _grammar(self, library: Any, source: str) -> str:
        return library.LLMatcher.grammar_from_regex(source)


@dataclass(frozen=True)
class Choice(Constraint):
    """One of these texts."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options) if not isinstance(self.options, str) else ())

    def _source(self) -> str:
        if not self.options or not all(isinstance(option, str) and option for option in self.options):
            raise ValueError(f"options are {self.options!r}; accepted: one or more strings, none of them empty")
        return "|".join(map(re.escape, self.options))

    def _grammar(self, library: Any, source: str) -> str:
        return library.LLMatcher.grammar_from_regex(source)


@dataclass(frozen=True)
class Grammar(Constraint):
    """A context-free grammar in the form of Lark, from the rule `start`."""

    lark: str

    def _source(self) -> str:
        if not isinstance(self.lark, str):
            raise TypeError(f"the grammar is {self.lark!r}; accepted: a string")
        return self.lark

    def _grammar(self, library: Any, source: str) -> str:
        return library.LLMatcher.grammar_from_lark(source)


class GrammarMatcher:
    """A `Matcher` by llguidance."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self.inner, self.vocab_size = inner, vocab_size

    def allowed(self) -> Tensor:
        return torch.from_numpy(_bits(masks([(self, ())], self.vocab_size), self.vocab_size)[0]).bool()

    def accept(self, token: int) -> bool:
        return self.inner.consume_token(token) and self.inner.is_stopped() and not self.failed

    def fork(self) -> GrammarMatcher:
        return GrammarMatcher(self.inner.deep_copy(), self.vocab_size)

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may come next."""
        return self.inner.validate_tokens(list(tokens)) if tokens else 0

    @property
    def failed(self) -> bool:
        """Whether a limit was met, after which nothing more can be said of the text."""
        return self.inner.is_error()


def mask_logits_(logits: Tensor, rows: Sequence[tuple[int, Matcher, Sequence[int]]]) -> None:
    """Sets the logits of what may not be drawn to -inf, for all constrained rows of a step at once; all of a row where
    its matcher has failed.

    Args:
        logits: (batch, vocab).
        rows: of each constrained row its index, its matcher and the drafts it comes after, which the matcher has not
            taken in.
    """
    longest: dict[int, tuple[Matcher, Sequence[int]]] = {}  # each matcher once, with the most drafts any row has
    for _, matcher, drafts in rows:
        if id(matcher) not in longest or len(drafts) > len(longest[id(matcher)][1]):
            longest[id(matcher)] = (matcher, drafts)
    begins = dict(zip(longest, itertools.accumulate((1 + len(d) for _, d in longest.values()), initial=0)))
    vocab = logits.shape[1]
    packed = masks(list(longest.values()), vocab)[[begins[id(matcher)] + len(drafts) for _, matcher, drafts in rows]]
    if logits.is_cpu:
        allowed = torch.from_numpy(_bits(packed, vocab)).bool()
    else:  # a bit for each token goes to the device
        shifts = torch.arange(32, device=logits.device, dtype=torch.int32)
        words = torch.from_numpy(packed).to(logits.device)
        allowed = (words[:, :, None] >> shifts & 1).flatten(1)[:, :vocab].bool()
    index = torch.tensor([row for row, _, _ in rows], device=logits.device)
    if len(index) == len(logits):
        logits.masked_fill_(~allowed, -torch.inf)
    else:
        logits[index] = logits[index].masked_fill_(~allowed, -torch.inf)


def masks(states: Sequence[tuple[Matcher, Sequence[int]]], vocab: int) -> np.ndarray:
    """The tokens allowed at each place of each state, before its drafts and after each of them, as int32 words of 32
    bits: (places, ceil(vocab / 32))."""
    counts = [1 + len(drafts) for _, drafts in states]
    words = np.full((sum(counts), -(-vocab // 32)), -1, np.int32)  # after a draft that is not allowed, anything is
    single: list[tuple[Any, int]] = []
    drafting: list[tuple[Any, int, list[int]]] = []  # of copies: a limit met among guesses must not end the text
    originals: list[Any] = []
    begin = 0
    for (matcher, drafts), count in zip(states, counts):
        if not isinstance(matcher, GrammarMatcher):
            _fill(words[begin : begin + count], matcher, drafts, vocab)
        elif drafts:
            drafting.append((matcher.inner.deep_copy(), begin, list(drafts)))
            originals.append(matcher.inner)
        else:
            single.append((matcher.inner, begin))
        begin += count
    where = (words.ctypes.data, words.shape[1] * 4, len(words))
    if drafting:
        _executor().unsafe_compute_mask_ptr_with_draft_token(drafting, *where)
    for original, (copy, row, drafts) in zip(originals, drafting):
        if copy.is_error():
            words[row + 1 : row + 1 + len(drafts)] = 0
            single.append((original, row))
    if single:
        _executor().unsafe_compute_mask_ptr(single, *where)
    for inner, row in single:
        if inner.is_error():
            words[row] = 0
    return words


def _fill(words: np.ndarray, matcher: Matcher, drafts: Sequence[int], vocab: int) -> None:
    """`masks` of one state whose matcher is of another make."""
    for place in range(len(words)):
        allowed = np.zeros(words.shape[1] * 32, np.uint8)
        allowed[:vocab] = matcher.allowed().cpu().numpy()[:vocab]
        words[place] = np.packbits(allowed, bitorder="little").view(np.int32)
        if place < len(drafts):
            matcher = matcher.fork() if place == 0 else matcher
            if not allowed[drafts[place]] or matcher.accept(drafts[place]):
                return


def _bits(words: np.ndarray, vocab: int) -> np.ndarray:
    """(rows, words) int32 -> (rows, vocab) uint8, 0 or 1."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, :vocab]


# ---- llguidance


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("structured output needs the package llguidance: pip install 'llmcore[structured]'") from None
    return llguidance


@cache
def _executor() -> Any:
    """Threads that work on many matchers at once."""
    return _library().LLExecutor(min(4, torch.get_num_threads()))


_bridges: WeakKeyDictionary[Tokenizer, dict[tuple, Any]] = WeakKeyDictionary()


def _bridge(tokenizer: Tokenizer, vocab_size: int, stops: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer: the bytes of every token, as a trie. It takes a fifth of a second, so once."""
    known = _bridges.setdefault(tokenizer, {})
    if (vocab_size, stops) not in known:
        if not stops or max(stops) >= vocab_size:
            raise ValueError(f"tokens that end a text are {list(stops)}; accepted: one or more, below {vocab_size}")
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, a row of logits {vocab_size}")
        try:
            made = _library().LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(stops))
        except ValueError as error:
            raise ValueError(f"its tokens must spell bytes, which this tokenizer's don't: {error}") from None
        known[vocab_size, stops] = made
    return known[vocab_size, stops]


def _without_anchors(pattern: str) -> str:
    """The pattern without ^ and $ at its ends, which say nothing where all of the text must match."""
    body = pattern.removeprefix("^")
    escapes = len(body) - 1 - len(body[:-1].rstrip("\\")) if body.endswith("$") else 1
    return body[:-1] if escapes % 2 == 0 else body


def _first_lines(message: str) -> str:
    """What llguidance says, less the state it may add."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines() if line.strip(" ^")]
    return " ".join(lines)[:500] or "it allows no text"
