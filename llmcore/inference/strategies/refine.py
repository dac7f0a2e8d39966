"""Self-refinement: the model criticises its answer and writes a better one (arXiv 2303.17651)."""

from __future__ import annotations

import dataclasses

from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies.best_of_n import by_score
from llmcore.inference.strategies.problem import Candidate, Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, sample
from llmcore.inference.strategies.scorers import SCORERS, Scorer, score, with_logprobs
from llmcore.inference.strategies.spec import Steps, one_of, optional, strategy, text, whole

CRITICISE = "Check the answer above for mistakes. If there are none, reply: No mistakes. Else say what is wrong."
REVISE = "Write a better answer to the question."


@strategy(
    "self-refine", bound=lambda s, most: most + s["rounds"] * (2 * most) + s["rounds"] + 1,
    rounds=whole(1, 16), criticise=text(1), revise=text(1), satisfied=text(1), scorer=optional(one_of(SCORERS)),
)  # fmt: skip
def self_refine(
    problem: Problem, params: SamplingParams, *, extract: Extract, rounds: int = 2, criticise: str = CRITICISE,
    revise: str = REVISE, satisfied: str = "no mistakes", scorer: str | Scorer | None = None,
) -> Steps:  # fmt: skip
    """An answer, then up to `rounds` times a critique of it and a new answer. It ends early when a critique says
    `satisfied` (in any case). The answer is the last one, or with a scorer the one with the highest score. The
    critiques are in the result's details."""
    params = params if scorer is None else with_logprobs(params, scorer)
    candidates: list[Candidate] = []
    critiques: list[str] = []
    curve: list[Point] = []
    spent, asked = 0, problem
    for number in range(rounds + 1):
        (candidate,) = yield from sample(asked, params, 1, extract)
        if scorer is not None:
            (candidate,) = yield from score(scorer, problem, [candidate])
        candidates.append(candidate)
        spent += len(candidate.tokens)
        best = _best(candidates)
        curve.append(Point(spent, best.answer, best.score))
        if number == rounds:
            break
        asked = problem.followed(candidate.text, criticise)
        (critique,) = yield from sample(asked, dataclasses.replace(params, constraint=None), 1)
        critiques.append(critique.text)
        spent += len(critique.tokens)
        if satisfied.lower() in critique.text.lower():
            break
        asked = asked.followed(critique.text, revise)
    return StrategyResult("", _best(candidates), candidates, curve, details={"critiques": critiques})


def _best(candidates: list[Candidate]) -> Candidate:
    return candidates[-1] if candidates[-1].score is None else candidates[by_score(candidates)[0]]
