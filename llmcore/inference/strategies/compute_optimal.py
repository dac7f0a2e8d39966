"""Spending a token budget where it helps most, by what was measured (the compute-optimal scaling of arXiv 2408.03314).

A table says, for each difficulty of a question, what each way of answering costs and how often it is right. How hard a
question is is told by how far a few samples of it agree.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies.problem import Point, Problem, StrategyResult
from llmcore.inference.strategies.sampling import Extract, sample
from llmcore.inference.strategies.spec import Field, Steps, check_spec, optional, shown, strategy, whole
from llmcore.inference.strategies.voting import by_vote

MAX_OPTIONS = 64


@dataclass(frozen=True)
class Option:
    """A way of answering: the spec of a strategy, and by difficulty what it was right in (a share), what it took (mean
    tokens generated) and of how many questions that is known."""

    spec: dict[str, Any]
    accuracy: tuple[float, ...]
    tokens: tuple[float, ...]
    questions: tuple[int, ...]


class Record(NamedTuple):
    """One question answered in one way: `correct` is whether it was right, or the share of several runs that were."""

    option: int
    agreement: float
    correct: float
    tokens: float


@dataclass(frozen=True)
class Table:
    """What was measured.

    Attributes:
        edges: falling shares of agreement that part the difficulties: number 0, the easiest, is at or above the first.
        options: the ways of answering.
    """

    edges: tuple[float, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        levels = len(self.edges) + 1
        if not all(0 <= edge <= 1 for edge in self.edges) or list(self.edges) != sorted(self.edges, reverse=True):
            raise ValueError(f"edges are {shown(self.edges)}; accepted: falling numbers of 0 to 1")
        if not 1 <= len(self.options) <= MAX_OPTIONS:
            raise ValueError(f"the table has {len(self.options)} options; accepted: 1 to {MAX_OPTIONS}")
        for option in self.options:
            if option.spec.get("name") == "compute-optimal":  # seen first: tables in tables in tables ...
                raise ValueError("an option's strategy is 'compute-optimal'; accepted: any other")
            check_spec(option.spec)
            columns = (option.accuracy, option.tokens, option.questions)
            if any(len(values) != levels or not all(0 <= v < 1e15 for v in values) for values in columns):
                raise ValueError(f"an option has {shown(columns)}; accepted: {levels} numbers each, 0 or more")

    @classmethod
    def measured(cls, specs: Sequence[Mapping[str, Any]], records: Iterable[Record], edges: Sequence[float]) -> Table:
        """Means over records. A difficulty of which an option has no record counts as never right, and as costing what
        the option costs on the whole."""
        edges, records = tuple(edges), list(records)
        options = []
        for number, spec in enumerate(specs):
            own = [r for r in records if r.option == number]
            if not own:
                raise ValueError(f"there is no record of {spec}; accepted: at least one for each option")
            mean = sum(r.tokens for r in own) / len(own)
            levels = [[r for r in own if _level(edges, r.agreement) == level] for level in range(len(edges) + 1)]
            options.append(
                Option(
                    dict(spec),
                    tuple(sum(r.correct for r in level) / len(level) if level else 0.0 for level in levels),
                    tuple(sum(r.tokens for r in level) / len(level) if level else mean for level in levels),
                    tuple(map(len, levels)),
                )
            )
        return cls(edges, tuple(options))

    @classmethod
    def of(cls, values: Table | Mapping[str, Any]) -> Table:
        """A table out of what `to_dict` made. Raises a ValueError for anything else."""
        if isinstance(values, Table):
            return values
        if not isinstance(values, Mapping):
            raise ValueError(f"the table is {shown(values)}; accepted: an object with 'edges' and 'options'")
        try:
            options = [
                Option(dict(o["spec"]), *(tuple(o[name]) for name in ("accuracy", "tokens", "questions")))
                for o in values["options"]
            ]
            return cls(tuple(values["edges"]), tuple(options))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error!r} in a table of options; accepted: 'edges' and 'options'") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def level(self, agreement: float) -> int:
        """The difficulty of a question whose samples agree so far."""
        return _level(self.edges, agreement)

    def choose(self, level: int, budget: float) -> Option | None:
        """The option that is right most often among those that cost no more, of equals the cheapest; None where each
        costs more."""
        within = [o for o in self.options if o.tokens[level] <= budget]
        return max(within, key=lambda o: (o.accuracy[level], -o.tokens[level]), default=None)

    def allocate(self, levels: Sequence[int], budget: float) -> list[Option | None]:
        """An option for each of many questions, so that most are right in all within the budget for them together;
        None: no tokens for it.

        Greedy: the next step up is always the one that gives most accuracy for its tokens, along the upper hull of each
        question's options. What the best choice could add is less than one such step.
        """
        hulls = [self._hull(level) for level in range(len(self.edges) + 1)]
        place = [0] * len(levels)
        steps = [
            ((up.gain - low.gain) / (up.cost - low.cost), question, number, up.cost - low.cost)
            for question, level in enumerate(levels)
            for number, (low, up) in enumerate(zip(hulls[level], hulls[level][1:]), 1)
        ]
        closed: set[int] = set()  # questions whose next step was too dear
        for _, question, number, cost in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
            if question in closed or cost > budget:
                closed.add(question)
                continue
            budget -= cost
            place[question] = number
        return [hulls[level][at].option for level, at in zip(levels, place)]

    def _hull(self, level: int) -> list[_Corner]:
        hull = [_Corner(0.0, 0.0, None)]
        for option in sorted(self.options, key=lambda o: (o.tokens[level], -o.accuracy[level])):
            corner = _Corner(option.tokens[level], option.accuracy[level], option)
            if corner.gain <= hull[-1].gain:
                continue
            if corner.cost == hull[-1].cost:  # as cheap and better: only where something costs nothing
                hull[-1] = corner
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], corner):
                hull.pop()
            hull.append(corner)
        return hull


class _Corner(NamedTuple):
    cost: float
    gain: float
    option: Option | None


def _slope(low: _Corner, up: _Corner) -> float:
    return (up.gain - low.gain) / (up.cost - low.cost)


def _level(edges: Sequence[float], agreement: float) -> int:
    return bisect.bisect_left([-edge for edge in edges], -agreement)


def _is_table(value: Any) -> bool:
    Table.of(value)  # its own errors say more
    return True


@strategy(
    "compute-optimal",
    bound=lambda s, most: max(
        [s["pilot"] * most]
        + [s["pilot"] * most + _option_bound(option, most) for option in Table.of(s["table"]).options]
    ),
    table=Field(_is_table, "a table of options"), budget=whole(1, 1 << 40), pilot=whole(1, 64),
    level=optional(whole(0, MAX_OPTIONS)),
)  # fmt: skip
def compute_optimal(
    problem: Problem, params: SamplingParams, *, extract: Extract, table: Table | Mapping[str, Any], budget: int,
    pilot: int = 4, level: int | None = None,
) -> Steps:  # fmt: skip
    """Answers in the way that the table says is best for a question this hard and `budget` tokens, means as they are.

    Args:
        table: see `Table`; an object as `Table.to_dict` makes it.
        pilot: samples that tell how hard the question is, by the share that agrees; their tokens are of the budget.
        level: how hard it is, where that is known: then there is no pilot.

    Where nothing fits into what is left, the answer is the pilot's vote, or without one that of the cheapest option.
    """
    table, spent, found = Table.of(table), 0, None
    if level is not None and level > len(table.edges):
        raise ValueError(f"level is {level}; accepted: 0 to {len(table.edges)}")
    if level is None:
        found = yield from sample(problem, params, pilot, extract)
        spent = sum(len(candidate.tokens) for candidate in found)
        index, agreement = by_vote(found)
        level = table.level(agreement)
        chosen = dataclasses.replace(found[index], score=agreement)
    option = table.choose(level, budget - spent)
    details: dict[str, Any] = {"level": level, "pilot_tokens": spent, "option": option.spec if option else None}
    if option is None:
        if found is not None:
            return StrategyResult("", chosen, found, [Point(spent, chosen.answer, chosen.score)], details=details)
        option = min(table.options, key=lambda o: o.tokens[level])
        details["option"] = option.spec
    made, settings = check_spec(option.spec)
    result = yield from made(problem, params, **{"extract": extract, **settings})
    curve = [point._replace(tokens=point.tokens + spent) for point in result.curve]
    return dataclasses.replace(result, curve=curve, details=details | result.details)


def _option_bound(option: Option, most: int) -> int:
    made, settings = check_spec(option.spec)
    return made.bound(made.check(settings), most)
