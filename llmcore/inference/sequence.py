"""A request on its way through the engine, and what its caller sees of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from llmcore.inference.params import SamplingParams
from llmcore.inference.text import TextStream


class Finish(enum.Enum):
    """Why a text ended."""

    STOP = "stop"  # a stop token or string, or the end of what a constraint allows
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # the model's logits were no numbers, or nothing may be drawn


@dataclass(frozen=True)
class TokenLogprob:
    """Of one token: its log-probability, its rank among all (1 is the likeliest; 0 where no others were asked for), and
    the likeliest ones', by id."""

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


@dataclass(eq=False)
class Sequence:
    """One choice of a request: tokens, of which the first `prompt_len` are the prompt, and how far it has come."""

    id: int
    request: Request
    index: int
    tokens: list[int]
    seed: int
    stream: TextStream  # its tokens as text
    text: str = ""  # not yet told to the caller
    computed: int = 0  # tokens whose keys and values are in the cache
    drafts: list[int] = field(default_factory=list)  # guesses of the next tokens, to be checked in this step
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
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told: then all of it is to be run."""
        told = self.request.prompt_logprobs
        asked = self.params.prompt_logprobs is not None and self.index == 0
        return asked and (told is None or len(told) < self.request.prompt_len)

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
    adapter: Any = None  # low-rank weights to run with
    salt: int = 0  # of the cache's prefixes: what was computed with other weights is no prefix
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    outputs: list[Completion] = field(default_factory=list)

    def __post_init__(self) -> None:
        p, self.prompt_len = self.params, len(self.prompt)
        # as `llmcore.ops.sample` takes them
        self.sampling = (float(p.temperature), p.top_k or 0, 1.0 if p.top_p is None else p.top_p, float(p.min_p or 0))
        # whether its logits are changed before a token is drawn
        self.adjusts = bool(p.has_penalties or p.logit_bias or p.min_tokens or p.constraint is not None)

    def result(self) -> RequestOutput:
        choices = sorted(self.outputs, key=lambda c: c.index)
        return RequestOutput(self.id, self.prompt, choices, self.prompt_logprobs, self.cached_tokens)


def completion(sequence: Sequence) -> Completion:
    logprobs = sequence.logprobs if sequence.params.logprobs is not None else None
    tokens = sequence.tokens[sequence.request.prompt_len :]
    return Completion(sequence.index, sequence.stream.text, tokens, logprobs, sequence.finish)
