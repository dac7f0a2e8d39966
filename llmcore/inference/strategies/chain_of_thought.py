"""Chain of thought: the model is told to reason before it answers (arXiv 2201.11903, 2205.11916)."""

from __future__ import annotations

import dataclasses

from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies.problem import Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, sample
from llmcore.inference.strategies.spec import Steps, strategy

INSTRUCTION = "Think step by step, then end with: The answer is"


@strategy("chain-of-thought", bound=lambda s, most: most)
def chain_of_thought(
    problem: Problem, params: SamplingParams, *, extract: Extract, instruction: str = INSTRUCTION
) -> Steps:
    """One text. The instruction, INSTRUCTION unless another is given, is put after the question; every strategy takes
    one, and "text" of `extract` keeps the whole text as the answer."""
    (candidate,) = yield from sample(problem, params, 1, extract)
    chosen = dataclasses.replace(candidate, score=None)
    return StrategyResult("", chosen, [candidate], [Point(len(candidate.tokens), candidate.answer, None)])
