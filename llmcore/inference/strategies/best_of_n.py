"""Best-of-N: many samples, and the one that a verifier likes best (arXiv 2110.14168); weighted, the answer whose
samples it likes best together (arXiv 2211.14275)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llmcore.inference.params import MAX_CHOICES, SamplingParams
from llmcore.inference.strategies.problem import Candidate, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, curve_of, sample, vote
from llmcore.inference.strategies.scorers import SCORERS, Scorer, score, with_logprobs
from llmcore.inference.strategies.spec import Steps, boolean, one_of, strategy, whole


@strategy(
    "best-of-n", bound=lambda s, most: s["n"] * (most + 1),
    n=whole(1, MAX_CHOICES), scorer=one_of(SCORERS), weighted=boolean,
)  # fmt: skip
def best_of_n(
    problem: Problem, params: SamplingParams, *, extract: Extract, n: int = 8, scorer: str | Scorer = "probability",
    weighted: bool = False,
) -> Steps:  # fmt: skip
    """The sample of n with the highest score. Weighted: the answer with the highest sum of scores, which must not be
    negative, in the words of its best sample; its score is then its share of all scores."""
    candidates = yield from sample(problem, with_logprobs(params, scorer), n, extract)
    candidates = yield from score(scorer, problem, candidates)
    choose = by_weight if weighted else by_score
    index, value = choose(candidates)
    return StrategyResult(
        "", dataclasses.replace(candidates[index], score=value), candidates, curve_of(candidates, choose)
    )


def by_score(candidates: Sequence[Candidate]) -> tuple[int, float]:
    index = max(range(len(candidates)), key=lambda i: candidates[i].score)
    return index, candidates[index].score


def by_weight(candidates: Sequence[Candidate]) -> tuple[int, float]:
    scores = [candidate.score for candidate in candidates]
    if min(scores) < 0:
        raise ValueError(f"the scorer gave {min(scores)}; accepted with weighted=true: 0 or more")
    answer, share = vote([candidate.answer for candidate in candidates], scores)
    if answer is None:
        return by_score(candidates)[0], 0.0
    return max((i for i, c in enumerate(candidates) if c.answer == answer), key=scores.__getitem__), share
