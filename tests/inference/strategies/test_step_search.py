"""Step-level search on a tree whose steps are right with a known probability, where its success can be computed."""

from __future__ import annotations

import math

import pytest

from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.inference.strategies import best_of_n, drive, step_search
from tests.inference.strategies.fakes import EOS, TOKENIZER, FakeEngine, problem, within

DEPTH, RIGHT, TRIALS = 4, 0.6, 1500
PARAMS = SamplingParams(max_tokens=64)


def tree(rng, before, params):
    """The next step: "+" is right (and the likelier one), "-" wrong. The text ends after DEPTH steps. Without a step's
    end to stop at, all the steps that are left."""
    steps = ""
    for depth in range(before.count("+") + before.count("-") + 1, DEPTH + 1):
        steps += "+" if params.temperature == 0 or rng.random() < RIGHT else "-"
        steps += "" if depth == DEPTH else "\n"
        if params.stop:
            break
    return steps, steps[-1] != "\n"


def sees_all(problem, candidates):
    """A process reward model that is always right."""
    return [1.0 if "-" not in c.text else 0.0 for c in candidates]


def sees_late(problem, candidates):
    """One that knows a step's worth when the next one is there, or the text has ended."""
    lines = [c.text.rstrip("\n").split("\n") for c in candidates]
    return [float("-" not in (l if c.finish else l[:-1])) for l, c in zip(lines, candidates)]


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def success(n: int, width: int, late: bool = False) -> float:
    """The chance that a text without a wrong step is found. What counts is how many beams are right so far: of the
    right beams' children the right ones are kept before others (late: right beams' children before others)."""
    kept = n // width
    right = {kept: 1.0}  # beams whose parents are right, as chosen at the last step: the roots are
    children = n
    for depth in range(1, DEPTH + 1):
        after: dict[int, float] = {}
        for count, probability in right.items():
            grown = children if depth == 1 else count * width
            seen = min(grown, kept) if late and depth < DEPTH else grown
            for k, chance in enumerate(binomial(seen, RIGHT)):
                after[min(k, kept)] = after.get(min(k, kept), 0.0) + probability * chance
        right = after
    return 1 - right[0]


def search(engine, **settings):
    results = [drive(engine, step_search(problem(), PARAMS, **settings)) for _ in range(TRIALS)]
    return sum(result.score == 1.0 and "-" not in result.text for result in results), results


@pytest.mark.parametrize(("n", "width"), [(4, 4), (8, 4), (8, 2), (6, 1)])
def test_beams_of_steps(n, width):
    expected = success(n, width)
    engine = FakeEngine(tree, seed=n)
    count, results = search(engine, n=n, width=width, scorer=sees_all)
    assert within(count, TRIALS, expected)
    alone = 1 - (1 - RIGHT**DEPTH) ** n
    if width == 1:
        assert math.isclose(expected, alone)  # as many texts that nobody prunes
    else:
        assert expected > alone + 0.08
        assert not within(count, TRIALS, alone)
    for result in results[:20]:
        assert len(result.curve) == DEPTH
        assert result.curve[-1].tokens == result.usage.generated_tokens
        assert result.chosen.finish is Finish.STOP
        assert TOKENIZER.decode(result.chosen.tokens[:-1]) == result.text
        assert result.chosen.tokens[-1] == EOS
    assert sum(result.usage.generated_tokens for result in results) == engine.generated


def test_best_of_n_as_reference():
    engine, n = FakeEngine(tree), 8
    results = [drive(engine, best_of_n(problem(), PARAMS, n=n, scorer=sees_all)) for _ in range(TRIALS)]
    count = sum(result.score == 1.0 for result in results)
    assert within(count, TRIALS, 1 - (1 - RIGHT**DEPTH) ** n)


def test_lookahead():
    """A judge that is a step late is as good as one that is not when it is shown a step more."""
    late, timely = success(8, 4, late=True), success(8, 4)
    assert timely > late + 0.1
    count, plain = search(FakeEngine(tree, seed=1), n=8, width=4, scorer=sees_late)
    assert within(count, TRIALS, late)
    assert not within(count, TRIALS, timely)
    engine = FakeEngine(tree, seed=2)
    count, ahead = search(engine, n=8, width=4, scorer=sees_late, lookahead=1)
    assert within(count, TRIALS, timely)
    # 8 greedy steps more at each depth but the last, which has no next one
    spent = [sum(r.usage.generated_tokens for r in results) for results in (plain, ahead)]
    assert spent[1] == engine.generated
    assert spent[1] - spent[0] == TRIALS * 8 * 2 * (DEPTH - 1)
    assert all(p.temperature == 0 for call in engine.calls[1:2] for _, p in call)


def test_seeds_give_every_step_its_own_noise():
    engine = FakeEngine(tree)
    results = [
        drive(engine, step_search(problem(), SamplingParams(max_tokens=64, seed=5), n=8, width=4, scorer=sees_all))
        for _ in range(2)
    ]
    assert results[0] == results[1]
    seeds = [p.seed + i for call in engine.calls[:DEPTH] for _, p in call for i in range(p.n)]
    assert len(set(seeds)) == len(seeds) == 8 * DEPTH


def test_limits_end_texts():
    endless = lambda rng, before, params: ("ab\n", False)  # noqa: E731
    longest = lambda problem, candidates: [len(c.text) for c in candidates]  # noqa: E731
    engine = FakeEngine(endless)
    result = drive(engine, step_search(problem(), SamplingParams(max_tokens=10), n=2, width=2, scorer=longest))
    assert (result.text, result.chosen.finish) == ("ab\nab\nab\na", Finish.LENGTH)
    steps = step_search(problem(), SamplingParams(max_tokens=99), n=2, width=2, scorer=longest, max_steps=3)
    result = drive(engine, steps)
    assert (result.text, result.chosen.finish) == ("ab\n" * 3, None)
    assert len(result.candidates) == 2
    one = step_search(
        problem(), SamplingParams(max_tokens=6), n=1, width=1, scorer=longest, max_step_tokens=2, step_end="x"
    )
    assert drive(engine, one).text == "ababab"


def test_refusals():
    with pytest.raises(ValueError, match="n is 8 and width 3; accepted: a multiple of the width"):
        step_search(problem(), PARAMS, n=8, width=3)
    with pytest.raises(ValueError, match=r"stop is \('x',\); accepted with step search: stop_token_ids, and step_end"):
        drive(FakeEngine(tree), step_search(problem(), SamplingParams(max_tokens=9, stop=("x",))))
    with pytest.raises(ValueError, match="a constraint is given; accepted with step search: None"):
        drive(FakeEngine(tree), step_search(problem(), SamplingParams(max_tokens=9, constraint=object())))
