"""Search over steps of reasoning, each judged as soon as it is written: beam and lookahead search against a process
reward model (arXiv 2408.03314)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from llmcore.inference.params import MAX_CHOICES, SamplingParams
from llmcore.inference.sequence import Completion, Finish, RequestOutput
from llmcore.inference.strategies.best_of_n import by_score, by_weight
from llmcore.inference.strategies.problem import Ask, Candidate, Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, ask, choices_of, seed_of
from llmcore.inference.strategies.scorers import SCORERS, Scorer, score, with_logprobs
from llmcore.inference.strategies.spec import Steps, boolean, one_of, strategy, text, whole

MAX_STEPS, MAX_LOOKAHEAD = 64, 8


def _bound(s: Mapping[str, Any], most: int) -> int:
    step = min(s["max_step_tokens"], most)
    return s["n"] * s["max_steps"] * (step * (1 + s["lookahead"]) + 1)


def _whole_beams(s: Mapping[str, Any]) -> None:
    if s["n"] % s["width"]:
        raise ValueError(f"n is {s['n']} and width {s['width']}; accepted: a multiple of the width")


@strategy(
    "step-search", bound=_bound, together=_whole_beams,
    n=whole(1, MAX_CHOICES), width=whole(1, MAX_CHOICES), lookahead=whole(0, MAX_LOOKAHEAD), scorer=one_of(SCORERS),
    step_end=text(1), max_steps=whole(1, MAX_STEPS), max_step_tokens=whole(1, 1 << 20), weighted=boolean,
)  # fmt: skip
def step_search(
    problem: Problem, params: SamplingParams, *, extract: Extract, n: int = 8, width: int = 4, lookahead: int = 0,
    scorer: str | Scorer = "probability", step_end: str = "\n", max_steps: int = 24, max_step_tokens: int = 128,
    weighted: bool = False,
) -> Steps:  # fmt: skip
    """Begins n texts with one step each, keeps the n / width that the scorer likes best, lets each of them go on with
    `width` different next steps, and so on. Texts that have ended and are still among the best are set aside, and the
    rest of the search has so many beams less. The answer is the finished text with the highest score (weighted: as in
    `best_of_n`).

    Args:
        lookahead: a step is judged by where so many greedy steps more lead; these are thrown away.
        scorer: sees the whole text so far, and judges it by its last step.
        step_end: the string that ends a step; a step of max_step_tokens ends too.
        max_steps: texts that have not ended after so many are judged as they are.

    Presence and frequency penalties begin anew with each step.

    Raises:
        ValueError: when params.stop holds strings, or there is a constraint: those are of a whole text.
    """
    if params.stop:
        raise ValueError(f"stop is {params.stop!r}; accepted with step search: stop_token_ids, and step_end")
    if params.constraint is not None:
        raise ValueError("a constraint is given; accepted with step search: None")
    search = _Search(problem, with_logprobs(params, scorer), step_end, max_step_tokens)
    kept, done, curve = n // width, [], []
    beams = yield from search.step([Candidate("", [])], n, 0)
    for depth in range(1, max_steps + 1):
        beams = yield from search.judge(beams, lookahead, scorer)
        last = depth == max_steps
        beams = sorted(beams, key=lambda beam: beam.score, reverse=True)[: n if last else kept]
        ended = [beam for beam in beams if last or beam.finish is not None]
        done += [dataclasses.replace(beam, answer=extract(beam.text)) for beam in ended]
        best = max([*beams, *done], key=lambda beam: beam.score)
        curve.append(Point(search.spent, extract(best.text), best.score))
        beams = [beam for beam in beams if beam.finish is None]
        kept -= len(ended)
        if not beams or last:
            break
        beams = yield from search.step(beams, width, depth * n)
    index, value = (by_weight if weighted else by_score)(done)
    return StrategyResult("", dataclasses.replace(done[index], score=value), done, curve)


class _Search:
    """Texts that grow by steps; `spent` counts their tokens."""

    def __init__(self, problem: Problem, params: SamplingParams, step_end: str, max_step_tokens: int) -> None:
        self.problem, self.params, self.step_end = problem, params, step_end
        self.most, self.max_step_tokens = problem.most_tokens(params), max_step_tokens
        self.stops = problem.stops(params)
        self.spent = 0

    def step(
        self, beams: Sequence[Candidate], width: int, first_seed: int, greedy: bool = False
    ) -> Generator[list[Ask], list[RequestOutput], list[Candidate]]:
        """Each beam with `width` different next steps."""
        asks, parents = [], []
        for number, beam in enumerate(beams):
            params = dataclasses.replace(
                self.params,
                max_tokens=min(self.max_step_tokens, self.most - len(beam.tokens)),
                min_tokens=max(0, self.params.min_tokens - len(beam.tokens)),
                stop=(self.step_end,),
                temperature=0.0 if greedy else self.params.temperature,
                seed=seed_of(self.params, first_seed + number * width),
            )
            before = dataclasses.replace(self.problem, tokens=[*self.problem.tokens, *beam.tokens])
            own = choices_of(before, params, width)
            asks += own
            parents += [beam] * len(own)
        outputs = yield from ask(asks)
        grown = [self._grown(beam, choice) for beam, output in zip(parents, outputs) for choice in output.choices]
        self.spent += sum(len(choice.tokens) for output in outputs for choice in output.choices)
        return grown

    def _grown(self, beam: Candidate, choice: Completion) -> Candidate:
        tokens = [*beam.tokens, *choice.tokens]
        logprob = None
        if choice.logprobs is not None:
            logprob = (beam.logprob or 0.0) + sum(t.logprob for t in choice.logprobs)
        finish = None
        if choice.finish is Finish.STOP and choice.tokens[-1] in self.stops:
            finish = Finish.STOP
        elif len(tokens) >= self.most:
            finish = Finish.LENGTH
        return Candidate(self.problem.decode(tokens), tokens, finish, logprob=logprob)

    def judge(
        self, beams: Sequence[Candidate], lookahead: int, scorer: str | Scorer
    ) -> Generator[list[Ask], list[RequestOutput], list[Candidate]]:
        """The beams with their scores: those of where they lead."""
        ahead = list(beams)
        for _ in range(lookahead):
            going = [i for i, beam in enumerate(ahead) if beam.finish is None]
            if not going:
                break
            further = yield from self.step([ahead[i] for i in going], 1, 0, greedy=True)
            for i, beam in zip(going, further):
                ahead[i] = beam
        scored = yield from score(scorer, self.problem, ahead)
        return [dataclasses.replace(beam, score=seen.score) for beam, seen in zip(beams, scored)]
