"""What drives a strategy: the engine, or the asynchronous one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import RequestOutput
from llmcore.inference.strategies.problem import Ask, Problem, Prompt, StrategyResult
from llmcore.inference.strategies.scorers import Scorer
from llmcore.inference.strategies.spec import Steps, check_spec

if TYPE_CHECKING:
    from llmcore.inference.async_engine import AsyncEngine

DEFAULT_PARAMS = SamplingParams(max_tokens=512, temperature=0.7)


def problem_for(engine: Engine, prompt: Prompt) -> Problem:
    """A prompt as a problem for the strategies on this engine."""
    return Problem.of(
        prompt,
        engine.tokenizer,
        stop_ids=engine.stop_ids,
        max_choices=engine.scheduler.max_sequences,
        max_length=engine.max_length,
    )


def drive(engine: Engine, steps: Steps) -> StrategyResult:
    """Runs a strategy to its end. All requests that it has open run together."""
    return drive_all(engine, [steps])[0]


def drive_all(engine: Engine, many: Sequence[Steps]) -> list[StrategyResult]:
    """Runs strategies to their ends, for many problems say. All requests that all of them have open run together, and
    each goes on when all have been answered."""
    results: list[Any] = [None] * len(many)
    sent: dict[int, list[RequestOutput] | None] = dict.fromkeys(range(len(many)))
    while True:
        asks: dict[int, list[Ask]] = {}
        for index, outputs in sent.items():
            request, results[index] = _next(many[index], outputs)
            if request is not None:
                asks[index] = request
        if not asks:
            return results
        together = [ask for request in asks.values() for ask in request]
        got = iter(engine.generate([ask.prompt for ask in together], [ask.params for ask in together]))
        sent = {index: [next(got) for _ in request] for index, request in asks.items()}


async def drive_async(engine: AsyncEngine, steps: Steps) -> StrategyResult:
    """The same beside other requests. The strategy's own work (a reward model, encoding) is done in a thread of its
    own. When it is cancelled or a request fails, the requests that it has open are aborted."""
    request, outputs = await asyncio.to_thread(_next, steps, None)
    while request is not None:
        tasks = [asyncio.ensure_future(engine.generate(ask.prompt, ask.params)) for ask in request]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        request, outputs = await asyncio.to_thread(_next, steps, outputs)
    return outputs


def _next(steps: Steps, outputs: list[RequestOutput] | None) -> tuple[list[Ask] | None, Any]:
    """The next requests, or None and the result. (A StopIteration can't leave a thread.)"""
    try:
        return steps.send(outputs), None
    except StopIteration as end:
        return None, end.value


def steps_of(
    problem: Problem,
    spec: Mapping[str, Any],
    params: SamplingParams | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> Steps:
    """The steps of the strategy that a spec names.

    Args:
        spec: {"name": "self-consistency", "n": 16, ...}; see `STRATEGIES`.
        params: of the samples; None: DEFAULT_PARAMS.
        scorers: more names that `scorer` may have in the spec.

    Raises:
        ValueError: for anything wrong with the spec, before anything is run.
    """
    if scorers and isinstance(spec, Mapping) and isinstance(spec.get("scorer"), str):
        spec = {**spec, "scorer": scorers.get(spec["scorer"], spec["scorer"])}
    made, settings = check_spec(spec)
    return made(problem, params or DEFAULT_PARAMS, **settings)


def run_strategy(
    engine: Engine,
    prompt: Prompt,
    spec: Mapping[str, Any],
    params: SamplingParams | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> StrategyResult:
    """Answers a prompt (a text, the messages of a chat, token ids) as a spec says: see `steps_of`."""
    return drive(engine, steps_of(problem_for(engine, prompt), spec, params, scorers))


async def run_strategy_async(
    engine: AsyncEngine,
    prompt: Prompt,
    spec: Mapping[str, Any],
    params: SamplingParams | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> StrategyResult:
    """`run_strategy` beside other requests."""
    problem = await asyncio.to_thread(problem_for, engine.engine, prompt)
    return await drive_async(engine, steps_of(problem, spec, params, scorers))
