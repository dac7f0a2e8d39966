"""The list of strategies, and the settings of each, which may come from a stranger's request."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import RequestOutput
from llmcore.inference.strategies.answers import EXTRACTORS
from llmcore.inference.strategies.problem import Ask, Problem, StrategyResult, Usage

# A strategy at work: it yields requests, all of which can run together, and is sent what they got.
Steps = Generator[list[Ask], list[RequestOutput], StrategyResult]
MAX_TEXT = 4096  # characters of an instruction


class Field(NamedTuple):
    """A setting: whether a value is good, and which are."""

    good: Callable[[Any], bool]
    accepted: str


def whole(low: int, high: int) -> Field:
    good = lambda v: isinstance(v, Integral) and not isinstance(v, bool) and low <= v <= high  # noqa: E731
    return Field(good, f"{low} to {high}")


def number(low: float, high: float) -> Field:
    good = lambda v: isinstance(v, Real) and not isinstance(v, bool) and low <= v <= high  # noqa: E731
    return Field(good, f"{low} to {high}")


def text(shortest: int = 0) -> Field:
    good = lambda v: isinstance(v, str) and shortest <= len(v) <= MAX_TEXT  # noqa: E731
    return Field(good, f"a text of {shortest} to {MAX_TEXT} characters")


def optional(field: Field) -> Field:
    return Field(lambda v: v is None or field.good(v), f"{field.accepted}, or None")


def one_of(names: Mapping[str, Any]) -> Field:
    """One of these names, or (from Python) a function."""
    return Field(lambda v: callable(v) or (isinstance(v, str) and v in names), ", ".join(map(repr, names)))


boolean = Field(lambda v: isinstance(v, bool), "true, false")


def shown(value: Any) -> str:
    """A value as an error tells it, however long it is."""
    written = repr(value)
    return written if len(written) <= 100 else written[:97] + "..."


@dataclass(frozen=True)
class Strategy:
    """A strategy by its name: `strategy(problem, params, **settings)` gives its steps.

    Attributes:
        fields: its settings; `defaults` holds those that need not be named.
        bound: the most tokens it generates, from its settings (all of them) and the params' max_tokens.
        together: raises a ValueError for settings that don't go together.
    """

    name: str
    function: Callable[..., Steps]
    fields: Mapping[str, Field]
    defaults: Mapping[str, Any]
    bound: Callable[[Mapping[str, Any], int], int]
    together: Callable[[Mapping[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.function.__doc__)

    def check(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, those that are not named at their defaults.

        Raises:
            ValueError: for a name that is no setting, a value out of its range, or one that is missing.
        """
        if unknown := [name for name in settings if name not in self.fields]:
            accepted = ", ".join(sorted(self.fields))
            raise ValueError(f"{shown(unknown[0])} is no setting of {self.name}; accepted: {accepted}")
        values = {**self.defaults, **settings}
        for name, (good, accepted) in self.fields.items():
            if name not in values:
                raise ValueError(f"{self.name} needs {name}; accepted: {accepted}")
            if name in settings and not good(values[name]):
                raise ValueError(f"{name} of {self.name} is {shown(values[name])}; accepted: {accepted}")
        if self.together is not None:
            self.together(values)
        return values

    def __call__(self, problem: Problem, params: SamplingParams, **settings: Any) -> Steps:
        settings = self.check(settings)
        if params.n != 1:
            raise ValueError(f"n of the sampling params is {params.n}; accepted with a strategy: 1")
        if (instruction := settings.pop("instruction")) is not None:
            problem = problem.instructed(instruction)
        settings["extract"] = EXTRACTORS.get(settings["extract"], settings["extract"])
        return _metered(self, self.function(problem, params, **settings))


def _metered(strategy: Strategy, steps: Steps) -> Steps:
    """The same steps; the result tells what all of them took."""
    usage, outputs = Usage(), None
    while True:
        try:
            asks = steps.send(outputs)
        except StopIteration as end:
            return dataclasses.replace(end.value, strategy=strategy.name, usage=usage)
        outputs = yield asks
        usage = usage.plus(outputs)


STRATEGIES: dict[str, Strategy] = {}


def strategy(
    name: str,
    *,
    bound: Callable[[Mapping[str, Any], int], int],
    together: Callable[[Mapping[str, Any]], None] | None = None,
    **fields: Field,
) -> Callable[[Callable[..., Steps]], Strategy]:
    """Makes a strategy of a generator function `f(problem, params, *, extract, ...)` and adds it to the list. Each has
    besides its own settings `instruction`, which is put after the question, and `extract`, how an answer is found in a
    text: a name in EXTRACTORS or a function."""

    def add(function: Callable[..., Steps]) -> Strategy:
        own = inspect.signature(function).parameters.values()
        defaults = {p.name: p.default for p in own if p.default is not inspect.Parameter.empty}
        common = {"instruction": optional(text(1)), "extract": one_of(EXTRACTORS)}
        made = Strategy(
            name, function, {**common, **fields}, {"instruction": None, "extract": "auto", **defaults}, bound, together
        )
        STRATEGIES[name] = made
        return made

    return add


def check_spec(spec: Mapping[str, Any]) -> tuple[Strategy, dict[str, Any]]:
    """The strategy that a spec {"name": ..., settings} names, and its settings.

    Raises:
        ValueError: for anything wrong with it.
    """
    if not isinstance(spec, Mapping) or not all(isinstance(key, str) for key in spec):
        raise ValueError(f"strategy is {shown(spec)}; accepted: an object with 'name' and settings")
    name = spec.get("name")
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ValueError(f"the strategy's name is {shown(name)}; accepted: {', '.join(map(repr, STRATEGIES))}")
    settings = {key: value for key, value in spec.items() if key != "name"}
    STRATEGIES[name].check(settings)
    return STRATEGIES[name], settings


def token_bound(spec: Mapping[str, Any], max_tokens: int) -> int:
    """The most tokens that the strategy of a spec generates, where a text may have `max_tokens`: for limits."""
    found, settings = check_spec(spec)
    return found.bound(found.check(settings), max_tokens)
