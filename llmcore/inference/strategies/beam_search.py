"""Beam search over tokens: the likeliest text, as far as `num_beams` texts at a time can see."""

from __future__ import annotations

from typing import NamedTuple

from llmcore.inference.params import MAX_LOGPROBS, SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.inference.strategies.problem import Ask, Candidate, Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, ask
from llmcore.inference.strategies.spec import Steps, boolean, number, strategy, whole


class _Beam(NamedTuple):
    logprob: float
    tokens: list[int]


@strategy(
    "beam-search", bound=lambda s, most: s["num_beams"] * most,
    num_beams=whole(1, MAX_LOGPROBS - 1), length_penalty=number(-10, 10), early_stopping=boolean,
)  # fmt: skip
def beam_search(
    problem: Problem, params: SamplingParams, *, extract: Extract, num_beams: int = 4, length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Steps:  # fmt: skip
    """The text with the highest log-probability / length ** length_penalty among those found. Of the params max_tokens,
    min_tokens and what ends a text count; the order is that of the model's own probabilities.

    Each step asks for one token after each beam, of which only the log-probabilities are used; the keys and values of
    what the beams share come from the prefix cache. It ends when the best running beam, by its score at its present
    length, is no better than the worst of `num_beams` finished ones; with early_stopping as soon as there are so many.

    Raises:
        ValueError: for params that beam search does not know, or more beams and stop tokens than the engine tells
            log-probabilities of.
    """
    most, stops = problem.most_tokens(params), problem.stops(params)
    width = num_beams + len(stops)  # so many of each beam's next tokens hold num_beams that don't end it
    _check(params, width)
    look = SamplingParams(max_tokens=1, temperature=0.0, logprobs=width, adapter=params.adapter)
    running, done = [_Beam(0.0, [])], []
    curve, spent = [], 0

    def score(beam: _Beam) -> float:
        return beam.logprob / len(beam.tokens) ** length_penalty

    for length in range(1, most + 1):
        outputs = yield from ask([Ask([*problem.tokens, *beam.tokens], look) for beam in running])
        spent += len(running)
        found = [
            _Beam(beam.logprob + logprob, [*beam.tokens, token])
            for beam, output in zip(running, outputs)
            for token, logprob in output.choices[0].logprobs[0].top.items()
            if length > params.min_tokens or token not in stops
        ]
        found.sort(key=lambda beam: beam.logprob, reverse=True)
        ends = [beam.tokens[-1] in stops or length == most for beam in found]
        # one that ends takes part only where it would have been kept as a beam
        done = sorted([*done, *(b for b, end in zip(found[:num_beams], ends) if end)], key=score, reverse=True)
        del done[num_beams:]
        running = [beam for beam, end in zip(found, ends) if not end][:num_beams]
        if done:
            curve.append(Point(spent, extract(problem.decode(_text(done[0], stops))), score(done[0])))
        full = len(done) == num_beams
        if not running or (full and (early_stopping or score(running[0]) <= score(done[-1]))):
            break
    candidates = [_candidate(problem, beam, stops, extract, score(beam)) for beam in done]
    return StrategyResult("", candidates[0], candidates, curve)


def _check(params: SamplingParams, width: int) -> None:
    for name, wrong, accepted in (
        ("stop", params.stop, "stop_token_ids"),
        ("logit_bias", params.logit_bias, "none"),
        ("constraint", params.constraint is not None, "None"),
        ("penalties", params.has_penalties, "none"),
    ):
        if wrong:
            raise ValueError(f"{name} is {getattr(params, name, 'set')!r}; accepted with beam search: {accepted}")
    if width > MAX_LOGPROBS:
        raise ValueError(f"there are {width} beams and stop tokens together; accepted: up to {MAX_LOGPROBS}")


def _text(beam: _Beam, stops: frozenset[int]) -> list[int]:
    return beam.tokens[:-1] if beam.tokens[-1] in stops else beam.tokens


def _candidate(problem: Problem, beam: _Beam, stops: frozenset[int], extract: Extract, score: float) -> Candidate:
    text = problem.decode(_text(beam, stops))
    finish = Finish.STOP if beam.tokens[-1] in stops else Finish.LENGTH
    return Candidate(text, beam.tokens, finish, extract(text), beam.logprob, score)
