"""An engine whose texts are written by a rule, so that what a strategy gains can be computed."""

from __future__ import annotations

import random
from collections.abc import Callable

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Completion, Finish, RequestOutput, TokenLogprob
from llmcore.inference.strategies import Problem
from llmcore.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer([], kind="byte")
EOS = TOKENIZER.eos_id
Write = Callable[[random.Random, str, SamplingParams], "tuple[str, bool]"]


class FakeEngine:
    """`write(rng, before, params)` gives the text that follows `before`, and whether it ends there. Counts what it
    generates, and keeps the asks of each call."""

    def __init__(self, write: Write, seed: int = 0) -> None:
        self.write, self.rng = write, random.Random(seed)
        self.calls: list[list[tuple[str, SamplingParams]]] = []
        self.generated = 0

    def generate(self, prompts, params):
        self.calls.append([(TOKENIZER.decode(prompt), p) for prompt, p in zip(prompts, params)])
        return [self._output(str(i), prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params))]

    def _output(self, name, prompt, params):
        return RequestOutput(name, list(prompt), [self._choice(i, prompt, params) for i in range(params.n)])

    def _choice(self, index, prompt, params):
        rng = self.rng if params.seed is None else random.Random(f"{params.seed + index} {len(prompt)}")
        text, ends = self.write(rng, TOKENIZER.decode(prompt), params)
        stops = [text.index(s) for s in params.stop if s in text]
        if stops:
            cut = min(stops)
            tokens = TOKENIZER.encode(text[: cut + len(next(s for s in params.stop if text.startswith(s, cut)))])
            text, finish = text[:cut], Finish.STOP
        else:
            tokens, finish = TOKENIZER.encode(text) + [EOS] * ends, Finish.STOP if ends else Finish.LENGTH
        if params.max_tokens is not None and len(tokens) > params.max_tokens:
            tokens, finish = tokens[: params.max_tokens], Finish.LENGTH
            text = TOKENIZER.decode(tokens, skip_special_tokens=True)
        ends_at = next((i for i, token in enumerate(tokens) if token in params.stop_token_ids), None)
        if ends_at is not None:
            tokens, text, finish = tokens[: ends_at + 1], TOKENIZER.decode(tokens[:ends_at]), Finish.STOP
        self.generated += len(tokens)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [TokenLogprob(token, -1.0, 1, {token: -1.0}) for token in tokens]
        return Completion(index, text, tokens, logprobs, finish)


def problem(text: str = "Q", **options) -> Problem:
    return Problem.of(text, TOKENIZER, **{"stop_ids": frozenset([EOS]), "max_choices": 128, **options})


def answering(shares: dict[str, float]) -> Write:
    """Draws an answer with the given probabilities."""

    def write(rng, before, params):
        (answer,) = rng.choices(list(shares), list(shares.values()))
        return f"I think the answer is {answer}.", True

    return write


def within(successes: int, trials: int, p: float, sigmas: float = 4.0) -> bool:
    """Whether so many successes are no further from p * trials than a right program is in all but 1 of 15,000 runs."""
    return abs(successes - p * trials) <= sigmas * (trials * p * (1 - p)) ** 0.5
