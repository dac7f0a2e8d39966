"""Budget forcing: the length of the reasoning is set from outside (s1, arXiv 2501.19393)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Completion, Finish
from llmcore.inference.strategies.problem import Ask, Candidate, Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, ask
from llmcore.inference.strategies.spec import Steps, strategy, text, whole


def _bound(s: Mapping[str, Any], most: int) -> int:
    """The end marks that are taken away have at most a token for each byte."""
    rounds = min(s["waits"] + s["min_thinking"], s["max_thinking"]) + 1
    return s["max_thinking"] + rounds * len(s["end"].encode()) + most


@strategy(
    "budget-forcing", bound=_bound,
    max_thinking=whole(1, 1 << 20), min_thinking=whole(0, 1 << 20), waits=whole(0, 64),
    begin=text(), end=text(1), wait=text(1), answer=text(),
)  # fmt: skip
def budget_forcing(
    problem: Problem, params: SamplingParams, *, extract: Extract, max_thinking: int = 1024, min_thinking: int = 0,
    waits: int = 0, begin: str = "<think>\n", end: str = "</think>", wait: str = "Wait", answer: str = "\n\n",
) -> Steps:  # fmt: skip
    """The model thinks, then answers. When it would end its thinking and has ended it no more than `waits` times, or
    has not thought min_thinking tokens, the end is taken away and `wait` put in its place; at max_thinking tokens,
    those of `wait` included, it is made to end.

    Args:
        begin, end: what stands before and after the thinking. A model without such marks can take "" and, as in the
            paper, "Final Answer:".
        answer: what is put after `end`, before the model writes the answer, which has params.max_tokens.
    """
    thinker = _Thinker(problem, params, end)
    opening, wait_ids, closing = (problem.encode(s, allow_special=True) for s in (begin, wait, end + answer))
    thoughts: list[int] = []
    _check_room(problem, params, len(opening) + max_thinking + len(closing))
    curve, spent, ends = [], 0, 0
    while len(thoughts) < max_thinking:
        params_now = thinker.params(max_thinking - len(thoughts))
        (output,) = yield from ask([Ask([*problem.tokens, *opening, *thoughts], params_now)])
        (choice,) = output.choices
        spent += len(choice.tokens)
        own, ended = thinker.before_end(choice)
        thoughts += own
        curve.append(Point(spent, extract(problem.decode(thoughts)), None))
        forced = ends < waits or (len(thoughts) < min_thinking and own)
        if not ended or not forced or len(thoughts) + len(wait_ids) > max_thinking:
            break
        ends += 1
        thoughts += wait_ids
    prompt = [*problem.tokens, *opening, *thoughts, *closing]
    (output,) = yield from ask([Ask(prompt, params)])
    candidate = Candidate.of(output.choices[0], extract)
    reasoning = problem.decode(thoughts)
    if candidate.answer is None:  # it may have been so sure that it left nothing to say
        candidate = dataclasses.replace(candidate, answer=extract(reasoning))
    chosen = dataclasses.replace(candidate, reasoning=reasoning)
    curve.append(Point(spent + len(candidate.tokens), chosen.answer, None))
    return StrategyResult(
        "", chosen, [chosen], curve, details={"thinking_tokens": len(thoughts), "times_continued": ends}
    )


class _Thinker:
    """Runs up to the end mark, whether that is a token of its own or a string; a stop token of the model ends its
    thinking too."""

    def __init__(self, problem: Problem, params: SamplingParams, end: str) -> None:
        self._problem, self._params, self._end = problem, params, end
        tokens = problem.encode(end, allow_special=True)
        self._end_id = tokens[0] if len(tokens) == 1 else None
        self._stops = problem.stops(params) | ({self._end_id} if self._end_id is not None else set())

    def params(self, most: int) -> SamplingParams:
        return dataclasses.replace(
            self._params,
            max_tokens=most,
            min_tokens=0,
            stop=() if self._end_id is not None else (self._end,),
            stop_token_ids=self._stops,
            constraint=None,  # that of the answer
        )

    def before_end(self, choice: Completion) -> tuple[list[int], bool]:
        """The tokens before the end mark, and whether there was one."""
        if choice.finish is not Finish.STOP:
            return choice.tokens, False
        if choice.tokens[-1] in self._stops:
            return choice.tokens[:-1], True
        # the mark may begin within a token: what stands before it there is encoded anew
        count = len(choice.tokens)
        while count and not choice.text.startswith(self._problem.decode(choice.tokens[:count])):
            count -= 1
        rest = choice.text[len(self._problem.decode(choice.tokens[:count])) :]
        return [*choice.tokens[:count], *self._problem.encode(rest)], True


def _check_room(problem: Problem, params: SamplingParams, thinking: int) -> None:
    if problem.max_length is None:
        return
    left = problem.max_length - len(problem.tokens) - thinking
    if left < (params.max_tokens or 1):
        raise ValueError(
            f"the prompt has {len(problem.tokens)} tokens, the thinking up to {thinking} and max_tokens is "
            f"{params.max_tokens}; accepted: together at most {problem.max_length}"
        )
