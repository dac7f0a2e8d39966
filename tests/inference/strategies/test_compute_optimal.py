"""The chooser: which way of answering a table recommends, for one question and for many."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies import Option, Record, Table, compute_optimal, drive, token_bound
from tests.inference.strategies.fakes import FakeEngine, answering, problem, within

ONE = {"name": "chain-of-thought", "instruction": None}
FOUR = {"name": "self-consistency", "n": 4}
MANY = {"name": "self-consistency", "n": 32}
TABLE = Table(
    (0.9,),
    (
        Option(ONE, (0.95, 0.4), (20, 30), (50, 50)),
        Option(FOUR, (0.95, 0.6), (80, 120), (50, 50)),
        Option(MANY, (0.96, 0.8), (640, 960), (50, 50)),
    ),
)
PARAMS = SamplingParams(max_tokens=64)
NUMBERS = {"accuracy": [1, 1], "tokens": [1, 2], "questions": [1, 1]}


def test_levels_and_choices():
    assert [TABLE.level(a) for a in (1.0, 0.9, 0.89, 0.0)] == [0, 0, 1, 1]
    assert TABLE.choose(0, 19) is None
    assert TABLE.choose(0, 100).spec == ONE  # as good as four, and cheaper
    assert TABLE.choose(1, 100).spec == ONE
    assert TABLE.choose(1, 120).spec == FOUR
    assert TABLE.choose(1, 10_000).spec == MANY


def test_measured():
    records = [
        Record(0, 1.0, True, 10),
        Record(0, 1.0, False, 30),
        Record(0, 0.5, False, 50),
        Record(1, 0.5, True, 200),
    ]
    table = Table.measured([ONE, FOUR], records, [0.75])
    assert table.options[0] == Option(ONE, (0.5, 0.0), (20, 50), (2, 1))
    assert table.options[1] == Option(FOUR, (0.0, 1.0), (200, 200), (0, 1))  # never seen: not to be counted on
    with pytest.raises(ValueError, match="there is no record of"):
        Table.measured([ONE, FOUR], records[:2], [0.75])


def test_there_and_back():
    assert Table.of(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [0.1, 0.9]}, "accepted: falling numbers"),
        ({"edges": ["b", "a"]}, "accepted: 'edges' and 'options'"),
        ({"edges": [2.0]}, "falling numbers of 0 to 1"),
        ({"edges": None}, "accepted: 'edges' and 'options'"),
        ({"options": []}, "the table has 0 options"),
        ({"options": [{"spec": {}}]}, "KeyError"),
        ({"options": [{"spec": ONE, "accuracy": [1], "tokens": [1, 2], "questions": [1, 1]}]}, "2 numbers each"),
        ({"options": [{"spec": ONE, "accuracy": ["x", 1], "tokens": [1, 2], "questions": [1, 1]}]}, "TypeError"),
        ({"options": [{"spec": {"name": "x"}, **NUMBERS}]}, "name is 'x'"),
        ({"options": [{"spec": {"name": "compute-optimal"}, **NUMBERS}]},
         "an option's strategy is 'compute-optimal'"),
    ],
)  # fmt: skip
def test_tables_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        Table.of({"edges": [0.9], "options": [], **change})


def test_tables_do_not_nest():
    """However deep: the innermost is never reached."""
    table = {"edges": [], "options": []}
    for _ in range(400):
        spec = {"name": "compute-optimal", "table": table, "budget": 1}
        table = {"edges": [], "options": [{"spec": spec, "accuracy": [1], "tokens": [1], "questions": [1]}]}
    with pytest.raises(ValueError, match="an option's strategy is 'compute-optimal'"):
        token_bound({"name": "compute-optimal", "table": table, "budget": 10}, 100)


def test_a_hard_question_gets_more_samples():
    """A sampler that is sure of "7" and one that is not: by the agreement of the pilot one gets a single text more, the
    other a vote of 32."""
    sure = drive(FakeEngine(answering({"7": 1.0})), compute_optimal(problem(), PARAMS, table=TABLE, budget=5000))
    assert (sure.answer, sure.details["level"]) == ("7", 0)
    assert sure.details["option"] == MANY  # by a hair better, and there is budget for it
    engine = FakeEngine(answering({"7": 1.0}))
    sure = drive(engine, compute_optimal(problem(), PARAMS, table=TABLE, budget=400))
    assert sure.details["option"] == ONE
    assert sure.usage.generated_tokens == engine.generated == sure.curve[-1].tokens
    assert sure.details["pilot_tokens"] == 4 * (engine.generated // 5)
    engine = FakeEngine(answering({"7": 0.5, "8": 0.3, "9": 0.2}), seed=3)
    results = [drive(engine, compute_optimal(problem(), PARAMS, table=TABLE, budget=5000)) for _ in range(400)]
    hard = [result for result in results if result.details["level"] == 1]
    assert within(len(hard), 400, 1 - 0.5**4 - 0.3**4 - 0.2**4)
    assert all(result.details["option"] == MANY for result in hard)
    assert sum(result.answer == "7" for result in hard) > 0.8 * len(hard)
    assert {result.strategy for result in results} == {"compute-optimal"}


def test_a_budget_that_is_spent_at_once():
    task = {"table": TABLE, "budget": 100}
    result = drive(FakeEngine(answering({"7": 1.0})), compute_optimal(problem(), PARAMS, **task))
    assert (result.answer, result.score, result.details["option"]) == ("7", 1.0, None)
    assert len(result.candidates) == 4
    result = drive(FakeEngine(answering({"7": 1.0})), compute_optimal(problem(), PARAMS, **task, level=1))
    assert (result.details["option"], result.usage.requests) == (ONE, 1)
    steps = compute_optimal(problem(), PARAMS, table=TABLE, budget=1, level=1)
    assert drive(FakeEngine(answering({"7": 1.0})), steps).details["option"] == ONE  # nothing is as cheap as that
    with pytest.raises(ValueError, match="level is 2; accepted: 0 to 1"):
        drive(FakeEngine(answering({"7": 1.0})), compute_optimal(problem(), PARAMS, **task, level=2))


def test_allocation_is_within_a_step_of_the_best():
    """Against every combination, on random tables."""
    rng = random.Random(1)
    for _ in range(60):
        levels = rng.choice([1, 2])
        options = tuple(
            Option({**FOUR, "n": i + 1}, tuple(rng.random() for _ in range(levels)),
                   tuple(rng.randint(1, 50) for _ in range(levels)), (9,) * levels)
            for i in range(3)
        )  # fmt: skip
        table = Table((0.5,) * (levels - 1), options)
        questions = [rng.randrange(levels) for _ in range(5)]
        budget = rng.randint(0, 200)
        chosen = table.allocate(questions, budget)
        value = lambda pick: sum(o.accuracy[q] for q, o in zip(questions, pick) if o)  # noqa: B023, E731
        cost = lambda pick: sum(o.tokens[q] for q, o in zip(questions, pick) if o)  # noqa: B023, E731
        best = max(value(p) for p in itertools.product([None, *options], repeat=5) if cost(p) <= budget)
        assert cost(chosen) <= budget
        assert best - value(chosen) < max(max(o.accuracy) for o in options)
        if budget >= 5 * 50:
            assert value(chosen) == best


def test_allocation_with_budget_for_all_and_none():
    assert TABLE.allocate([0, 1], 10) == [None, None]
    assert [o.spec for o in TABLE.allocate([0, 1], 1e6)] == [MANY, MANY]
    # the second question's four samples are worth more than the first one's
    assert [o.spec for o in TABLE.allocate([0, 1], 140)] == [ONE, FOUR]


def test_bound():
    spec = {"name": "compute-optimal", "table": TABLE.to_dict(), "budget": 10}
    assert token_bound(spec, 100) == 4 * 100 + 32 * 100
