from __future__ import annotations

import re
from collections import Counter

import pytest

from llmcore.data import word_problems


def test_solutions_are_right():
    problems = list(word_problems(500, seed=3, steps=(1, 4)))
    for problem in problems:
        *lines, last = problem.solution.split("\n")
        assert last == f"#### {problem.answer}"
        assert len(lines) == problem.steps
        value = int(re.search(r"has (\d+)", problem.question)[1])
        for line in lines:
            left, _, result = line.partition(" = ")
            before, symbol, operand = left.split()
            assert int(before) == value
            value, rest = {
                "+": (value + int(operand), 0), "-": (value - int(operand), 0),
                "*": (value * int(operand), 0), "/": divmod(value, int(operand)),
            }[symbol]  # fmt: skip
            assert (value, rest) == (int(result), 0)
            words = {("*", "2"): "doubles", ("*", "3"): "triples"}
            assert words.get((symbol, operand), operand) in problem.question
        assert value == problem.answer
        assert 0 < value <= 200
    assert {p.steps for p in problems} == {1, 2, 3, 4}
    assert len({p.question for p in problems}) == 500
    assert max(Counter(p.answer for p in problems).values()) < 30  # no answer that is always a good guess


def test_seeds():
    first = list(word_problems(20, seed=1))
    assert list(word_problems(30, seed=1))[:20] == first
    assert list(word_problems(20, seed=2)) != first
    assert list(word_problems(0)) == []
    assert all(p.steps == 3 for p in word_problems(9, steps=3))


@pytest.mark.parametrize(("count", "steps"), [(-1, 1), (1, 0), (1, (3, 2)), (1, 9)])
def test_refusals(count, steps):
    with pytest.raises(ValueError, match=r"accepted: 0 or more, and within 1 to 8"):
        list(word_problems(count, steps=steps))
