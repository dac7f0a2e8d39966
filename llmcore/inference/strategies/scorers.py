"""What says how good a text is: a verifier, a reward model of whole answers, or one of single steps.

A scorer is called as `scorer(problem, candidates)` and gives a number for each candidate; higher is better. A candidate
whose `finish` is None is the beginning of an answer. A scorer that needs the engine is a generator function: it yields
requests as a strategy does and returns the numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence

from llmcore.inference.params import MAX_LOGPROBS, SamplingParams
from llmcore.inference.sequence import RequestOutput
from llmcore.inference.strategies.problem import Ask, Candidate, Problem
from llmcore.inference.strategies.sampling import ask

Scorer = Callable[[Problem, Sequence[Candidate]], "Sequence[float] | Generator[list[Ask], list[RequestOutput], Sequence[float]]"]  # noqa: E501  # fmt: skip


def score(
    scorer: str | Scorer, problem: Problem, candidates: Sequence[Candidate]
) -> Generator[list[Ask], list[RequestOutput], list[Candidate]]:
    """The candidates with their scores.

    Raises:
        RuntimeError: when the scorer gives something else than a finite number for each.
    """
    if not candidates:
        return []
    scorer = SCORERS[scorer] if isinstance(scorer, str) else scorer
    values = scorer(problem, candidates)
    if isinstance(values, Generator):
        values = yield from values
    values = [float(value) for value in values]
    if len(values) != len(candidates) or not all(map(math.isfinite, values)):
        raise RuntimeError(f"the scorer gave {values}; accepted: {len(candidates)} finite numbers")
    return [dataclasses.replace(candidate, score=value) for candidate, value in zip(candidates, values)]


def with_logprobs(params: SamplingParams, scorer: str | Scorer) -> SamplingParams:
    """Params of the samples that a scorer is to see."""
    needed = scorer in ("probability", probability) and params.logprobs is None
    return dataclasses.replace(params, logprobs=0) if needed else params


def probability(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
    """How likely the model finds its own text: the geometric mean of its tokens' probabilities."""
    if any(candidate.logprob is None for candidate in candidates):
        raise ValueError("the candidates have no log-probabilities; accepted: samples drawn with logprobs=0")
    return [math.exp(candidate.logprob / max(len(candidate.tokens), 1)) for candidate in candidates]


QUESTION = "Is this answer correct? Reply with Yes or No."


def verify(problem: Problem, candidates: Sequence[Candidate]) -> Generator[list[Ask], list[RequestOutput], list[float]]:
    """What the model itself says when it is asked whether the answer is right: the probability of Yes beside that of No
    (P(True) of arXiv 2207.05221); one half where neither is among the likeliest tokens."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)
    asks = [Ask(problem.followed(candidate.text, QUESTION).tokens, params) for candidate in candidates]
    outputs = yield from ask(asks)
    return [_yes(problem, output.choices[0].logprobs[0].top) for output in outputs]


def _yes(problem: Problem, top: dict[int, float]) -> float:
    said = {"yes": 0.0, "no": 0.0}
    for token, logprob in top.items():
        word = problem.decode([token]).strip().lower()
        if word in said:
            said[word] += math.exp(logprob)
    total = sum(said.values())
    return said["yes"] / total if total else 0.5


SCORERS: dict[str, Scorer] = {"probability": probability, "verify": verify}
