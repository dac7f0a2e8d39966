"""A request on its way through the engine, and what its caller sees of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from llmcore.inference.params import SamplingParams
from llmcore.tokenizers import Tokenizer


class Finish(enum.Enum):
    """Why a text ended."""

    STOP = "stop"  # a stop token or string, or the end of what a constraint allows
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # the model's logits were no numbers, or nothing may be drawn


@dataclass(frozen=True)
class TokenLogprob:
    """Of one token: its log-probability, its rank among all (1 is the likeliest), and the likeliest ones', by id."""

    token: int
    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(frozen=True)
class Delta:
    """What a step added to one choice of a request."""

    request_id: str
    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with a request's first delta, where asked for
    finish: Finish | None = None


@dataclass
class Completion:
    """A finished choice. `text` lacks the stop string and special tokens, `tokens` holds all."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish: Finish


@dataclass
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt_tokens: list[int]
    choices: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0  # of the prompt, found in the cache


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters that begin no stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._begin = self._shown = 0  # the text of ids[begin:shown] has been taken into `_text`
        self._text, self._given = "", 0

    def add(self, token: int, may_stop: bool = True) -> bool:
        """Takes a token in; whether the text now holds a stop string, with which it ends."""
        if self._tokenizer is None:
            return False
        self._ids.append(token)
        # decoded with what came just before: where a token stands decides on its leading space
        known = self._decode(self._begin, self._shown)
        text = self._decode(self._begin, len(self._ids))
        if text.endswith("\ufffd") and len(self._ids) - self._shown < 8:  # the rest of a character is to come
            return False
        new = text[len(known) :]
        self._begin, self._shown = self._shown, len(self._ids)
        begin = max(0, len(self._text) - max(map(len, self._stop), default=0) + 1)
        self._text += new
        if may_stop:
            ends = [self._text.find(s, max(begin, self._given)) for s in self._stop]
            if any(end >= 0 for end in ends):
                self._text = self._text[: min(end for end in ends if end >= 0)]
                return True
        return False

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True) if begin < end else ""

    def take(self, last: bool = False) -> str:
        """The text that is certain since the last call; with `last` all of it."""
        if last and self._tokenizer is not None and self._shown < len(self._ids):
            self._text += self._decode(self._begin, len(self._ids))[len(self._decode(self._begin, self._shown)) :]
            self._shown = len(self._ids)
        end = len(self._text) if last else len(self._text) - self._held_back()
        text, self._given = self._text[self._given : end], max(self._given, end)
        return text

    def _held_back(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._text) - self._given)
        for count in range(longest, 0, -1):
            if any(s.startswith(self._text[-count:]) for s in self._stop):
                return count
        return 0

    @property
    def text(self) -> str:
        return self._text


@dataclass(eq=False)
class Sequence:
    """One choice of a request: tokens, of which the first `prompt_len` are the prompt, and how far it has come."""

    id: int
    request: Request
    index: int
    tokens: list[int]
    seed: int
    stream: TextStream
    computed: int = 0  # tokens whose keys and values are in the cache
    drafts: list[int] = field(default_factory=list)  # guesses of the next tokens, to be checked in this step
    new: list[int] = field(default_factory=list)  # tokens not yet told to the caller
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    saved: Any = None  # its part of the cache, while swapped out
    matcher: Any = None  # of the constraint

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.request.prompt_len

    @property
    def forks_to_come(self) -> int:
        """Choices that will join when the prompt has been run."""
        return self.params.n - len(self.request.sequences) if self.index == 0 else 0

    @property
    def remaining(self) -> int:
        """Tokens to be run before the next one can be drawn."""
        return len(self.tokens) - self.computed


@dataclass(eq=False)
class Request:
    """A prompt and its choices. Choices after the first join when the prompt has been run."""

    id: str
    prompt: list[int]
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)
    max_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    salt: int = 0  # of the cache's prefixes: what was computed with other weights is no prefix
    arrival: float = 0.0
    first_token_time: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    matcher: Any = None  # of the constraint, at the beginning of a text
    outputs: list[Completion] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    def result(self) -> RequestOutput:
        choices = sorted(self.outputs, key=lambda c: c.index)
        return RequestOutput(self.id, self.prompt, choices, self.prompt_logprobs, self.cached_tokens)


def completion(sequence: Sequence) -> Completion:
    logprobs = sequence.logprobs if sequence.params.logprobs is not None else None
    tokens = sequence.tokens[sequence.request.prompt_len :]
    return Completion(sequence.index, sequence.stream.text, tokens, logprobs, sequence.finish)
