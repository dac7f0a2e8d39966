"""Arithmetic word problems made by rule: questions whose answers are known, for tests, evaluation and training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_STEPS = 8
_LARGEST = 200  # of a number on the way

_NAMES = (
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona", "Noah",
    "Olga", "Paul", "Rosa", "Samir", "Tina", "Victor",
)  # fmt: skip
_THINGS = (
    "apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "tickets",
)  # fmt: skip


@dataclass(frozen=True)
class WordProblem:
    """A question, its answer, a solution of a line a step that ends in "#### answer", and the number of steps."""

    question: str
    answer: int
    solution: str
    steps: int


def word_problems(count: int, *, seed: int = 0, steps: int | tuple[int, int] = (1, 3)) -> Iterator[WordProblem]:
    """Problems of additions, subtractions, multiplications and divisions on whole numbers up to 200.

    Args:
        seed: problem i of a seed is always the same, whatever the count.
        steps: operations of a problem, or the fewest and the most.

    Raises:
        ValueError: for a count below 0, or steps out of 1 to MAX_STEPS.
    """
    low, high = (steps, steps) if isinstance(steps, int) else steps
    if count < 0 or not 1 <= low <= high <= MAX_STEPS:
        raise ValueError(f"count is {count}, steps {steps}; accepted: 0 or more, and within 1 to {MAX_STEPS}")
    for index in range(count):
        yield _problem(random.Random(f"{seed}/{index}"), low, high)


def _problem(rng: random.Random, low: int, high: int) -> WordProblem:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    wanted, value = rng.randint(low, high), rng.randint(5, 40)
    sentences = [f"{name} has {value} {thing}."]
    lines: list[str] = []
    while len(lines) < wanted:
        made = rng.choice(_OPERATIONS)(rng, value, name, thing)
        if made is None:
            continue
        sentence, symbol, operand, result = made
        lines.append(f"{value} {symbol} {operand} = {result}")
        sentences.append(sentence)
        value = result
    question = " ".join([*sentences, f"How many {thing} does {name} have now?"])
    return WordProblem(question, value, "\n".join([*lines, f"#### {value}"]), wanted)


_Made = "tuple[str, str, int, int] | None"  # sentence, symbol, operand, result; None: it can't be done with this number


def _gain(rng: random.Random, value: int, name: str, thing: str) -> _Made:
    count = rng.randint(2, 30)
    friend = rng.choice([n for n in _NAMES if n != name])
    sentence = rng.choice(
        [
            f"{friend} gives {name} {count} more.",
            f"Then {name} buys {count} more {thing}.",
            f"{name} finds {count} more.",
        ]
    )
    return (sentence, "+", count, value + count) if value + count <= _LARGEST else None


def _loss(rng: random.Random, value: int, name: str, thing: str) -> _Made:
    if value < 4:
        return None
    count = rng.randint(2, min(30, value - 1))
    friend = rng.choice([n for n in _NAMES if n != name])
    ways = (f"{name} gives {count} of them to {friend}.", f"{name} loses {count}.", f"Then {name} sells {count}.")
    return rng.choice(ways), "-", count, value - count


def _times(rng: random.Random, value: int, name: str, thing: str) -> _Made:
    word, count = rng.choice([("doubles", 2), ("triples", 3)])
    return (f"Then {name} {word} the number of {thing}.", "*", count, value * count) if value <= _LARGEST // 3 else None


def _share(rng: random.Random, value: int, name: str, thing: str) -> _Made:
    divisors = [d for d in (2, 3, 4, 5) if value % d == 0 and value // d >= 2]
    if not divisors:
        return None
    count = rng.choice(divisors)
    return f"{name} puts the {thing} into {count} equal bags and keeps one bag.", "/", count, value // count


_OPERATIONS: tuple[Callable[[random.Random, int, str, str], _Made], ...] = (_gain, _loss, _times, _share)
