"""Samples of a problem's answer: what most strategies begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish, RequestOutput
from llmcore.inference.strategies.problem import Ask, Candidate, Point, Problem

Extract = Callable[[str], "str | None"]
Choose = Callable[[Sequence[Candidate]], "tuple[int, float | None]"]  # the index of the best, and its score


class StrategyFailed(RuntimeError):
    """A request of a strategy ended without an answer."""


def ask(asks: list[Ask]) -> Generator[list[Ask], list[RequestOutput], list[RequestOutput]]:
    """Has requests run.

    Raises:
        StrategyFailed: when one of them was aborted, or the model's logits were no numbers.
    """
    outputs = yield asks
    for choice in (choice for output in outputs for choice in output.choices):
        if choice.finish in (Finish.ABORT, Finish.ERROR):
            what = "was aborted" if choice.finish is Finish.ABORT else "met logits that are no numbers"
            raise StrategyFailed(f"a request of the strategy {what}")
    return outputs


def choices_of(problem: Problem, params: SamplingParams, n: int, first: int = 0) -> list[Ask]:
    """Requests for n choices, as few as the engine allows. Choice i has the seed + first + i."""
    asks = []
    for begin in range(0, n, problem.max_choices):
        count = min(problem.max_choices, n - begin)
        asks.append(Ask(problem.tokens, dataclasses.replace(params, n=count, seed=seed_of(params, first + begin))))
    return asks


def seed_of(params: SamplingParams, offset: int) -> int | None:
    return None if params.seed is None else (params.seed + offset + 2**63) % 2**64 - 2**63


def sample(
    problem: Problem, params: SamplingParams, n: int, extract: Extract | None = None
) -> Generator[list[Ask], list[RequestOutput], list[Candidate]]:
    """n samples, which share the prompt's part of the cache."""
    outputs = yield from ask(choices_of(problem, params, n))
    return [Candidate.of(choice, extract) for output in outputs for choice in output.choices]


def curve_of(candidates: Sequence[Candidate], choose: Choose) -> list[Point]:
    """What would have been chosen after each of the candidates."""
    points, tokens = [], 0
    for count, candidate in enumerate(candidates, 1):
        tokens += len(candidate.tokens)
        index, score = choose(candidates[:count])
        points.append(Point(tokens, candidates[index].answer, score))
    return points


def vote(answers: Sequence[str | None], weights: Iterable[float] | None = None) -> tuple[str | None, float]:
    """The answer with the most votes (or weight), among equals the one that was given first; and its share of all. A
    text without an answer has no vote, but counts among all."""
    tally: dict[str, float] = {}
    total = 0.0
    for answer, weight in zip(answers, weights if weights is not None else [1.0] * len(answers)):
        total += weight
        if answer is not None:
            tally[answer] = tally.get(answer, 0.0) + weight
    if not tally:
        return None, 0.0
    best = max(tally, key=tally.__getitem__)
    return best, tally[best] / total if total else 0.0
