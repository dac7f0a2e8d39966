"""Self-consistency: many chains of thought, and the answer that most of them come to (arXiv 2203.11171)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llmcore.inference.params import MAX_CHOICES, SamplingParams
from llmcore.inference.strategies.problem import Candidate, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, curve_of, sample, vote
from llmcore.inference.strategies.spec import Steps, strategy, whole


@strategy("self-consistency", bound=lambda s, most: s["n"] * most, n=whole(1, MAX_CHOICES))
def self_consistency(problem: Problem, params: SamplingParams, *, extract: Extract, n: int = 8) -> Steps:
    """The answer with the most votes among n samples, in the words of the first sample that gave it; its score is its
    share of the votes. The samples should differ: a temperature of 0.5 to 1."""
    candidates = yield from sample(problem, params, n, extract)
    index, share = by_vote(candidates)
    chosen = dataclasses.replace(candidates[index], score=share)
    return StrategyResult("", chosen, candidates, curve_of(candidates, by_vote))


def by_vote(candidates: Sequence[Candidate]) -> tuple[int, float]:
    answers = [candidate.answer for candidate in candidates]
    answer, share = vote(answers)
    return answers.index(answer) if answer is not None else 0, share
