"""What a request may ask for, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from llmcore.inference.sampling import check_sampling

MAX_CHOICES, MAX_LOGPROBS, MAX_STOP = 128, 20, 64


@dataclass(frozen=True)
class SamplingParams:
    """How a request is continued.

    Attributes:
        max_tokens: the most new tokens; None: up to the model's longest sequence.
        min_tokens: before this many new tokens neither stop tokens nor stop strings end the text.
        temperature, top_k, top_p, min_p: see `llmcore.ops.sample`; temperature 0 is greedy.
        repetition_penalty, presence_penalty, frequency_penalty: see `llmcore.ops.apply_penalties_`.
        logit_bias: token id -> what is added to its logit; -inf forbids it.
        seed: of the noise; choice i has seed + i. None: drawn. A token is a function of its logits, its seed and its
            place in the sequence, so what a request gets does not depend on the requests beside it.
        n: choices, which share the prompt's blocks of the cache.
        stop: strings that end the text; they are no part of it.
        stop_token_ids: tokens that end the text, besides the model's own; ignore_eos: those don't.
        logprobs: how many of the likeliest tokens to tell the log-probability of, besides the chosen token's; None: no
            log-probabilities at all. Those of the model, before temperature and filters.
        prompt_logprobs: the same for the tokens of the prompt.
        constraint: what the text must be (see `llmcore.inference.constraints`). It ends where that is complete,
            min_tokens or not.
        adapter: the name of the LoRA adapter to run with.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Any = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        whole = lambda value, low, high: isinstance(value, Integral) and low <= value <= high  # noqa: E731
        number = lambda value: isinstance(value, Real) and math.isfinite(value)  # noqa: E731
        for name, good, accepted in (
            ("max_tokens", self.max_tokens is None or whole(self.max_tokens, 1, 2**31), "1 or more, or None"),
            ("min_tokens", whole(self.min_tokens, 0, 2**31), "0 or more"),
            ("repetition_penalty", number(self.repetition_penalty) and self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", number(self.presence_penalty), "a number"),
            ("frequency_penalty", number(self.frequency_penalty), "a number"),
            ("seed", self.seed is None or whole(self.seed, -(2**63), 2**64 - 1), "-2**63 to 2**64 - 1, or None"),
            ("n", whole(self.n, 1, MAX_CHOICES), f"1 to {MAX_CHOICES}"),
            ("stop", len(stop) <= MAX_STOP and all(isinstance(s, str) and s for s in stop),
             f"up to {MAX_STOP} strings, none of them empty"),
            ("logprobs", self.logprobs is None or whole(self.logprobs, 0, MAX_LOGPROBS),
             f"0 to {MAX_LOGPROBS}, or None"),
            ("prompt_logprobs", self.prompt_logprobs is None or whole(self.prompt_logprobs, 0, MAX_LOGPROBS),
             f"0 to {MAX_LOGPROBS}, or None"),
            ("logit_bias", all(whole(k, 0, 2**31) and isinstance(v, Real) and v < math.inf
                               for k, v in self.logit_bias.items()), "token ids and numbers below infinity"),
        ):  # fmt: skip
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
