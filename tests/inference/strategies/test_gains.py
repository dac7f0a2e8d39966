"""Strategies on a sampler of known accuracy: how often they are right is computed exactly, and measured."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from llmcore.inference.params import SamplingParams
from llmcore.inference.strategies import best_of_n, drive, self_consistency
from tests.inference.strategies.fakes import FakeEngine, answering, problem, within

PARAMS = SamplingParams(max_tokens=64)
TRIALS = 2000


def outcomes(n: int, probabilities: list[float]):
    """(counts, probability) of every way in which n draws fall into the classes."""
    classes = len(probabilities)
    for bars in itertools.combinations(range(n + classes - 1), classes - 1):
        edges = (-1, *bars, n + classes - 1)
        counts = [b - a - 1 for a, b in itertools.pairwise(edges)]
        ways = math.factorial(n) / math.prod(map(math.factorial, counts))
        yield counts, ways * math.prod(p**c for p, c in zip(probabilities, counts))


def majority(n: int, shares: list[float]) -> float:
    """How often the first class has the most votes. A tie goes to the answer that came first, which by symmetry is each
    of the tied ones equally often."""
    total = 0.0
    for counts, probability in outcomes(n, shares):
        most = max(counts)
        if counts[0] == most:
            total += probability / counts.count(most)
    return total


def right(strategy, engine, trials=TRIALS, **settings):
    results = [drive(engine, strategy(problem(), PARAMS, **settings)) for _ in range(trials)]
    return sum(result.answer == "1" for result in results), results


def test_the_reference_itself():
    assert math.isclose(sum(p for _, p in outcomes(5, [0.5, 0.3, 0.2])), 1)
    assert math.isclose(majority(3, [0.6, 0.4]), 0.6**3 + 3 * 0.6**2 * 0.4)
    assert math.isclose(majority(2, [0.6, 0.4]), 0.6**2 + 0.6 * 0.4)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("shares", [[0.6, 0.4], [0.4, 0.25, 0.2, 0.15], [0.3, 0.5, 0.2]])
def test_majority_vote(n, shares):
    """Two answers (Condorcet), the right one the likeliest of many, and a sampler whose likeliest answer is wrong,
    which votes make worse."""
    expected = majority(n, shares)
    engine = FakeEngine(answering({str(i + 1): p for i, p in enumerate(shares)}), seed=n)
    count, results = right(self_consistency, engine, n=n)
    assert within(count, TRIALS, expected)
    if n == 9:
        assert (expected > shares[0] + 0.05) == (shares[0] == max(shares))
        assert not within(count, TRIALS, shares[0])  # so the gain was seen
    assert sum(result.usage.generated_tokens for result in results) == engine.generated
    assert all(len(call) == 1 for call in engine.calls)  # one request, whatever n


def test_the_curve_is_that_of_fewer_samples():
    """After k of n samples the vote is right as often as a vote of k."""
    shares = [0.45, 0.3, 0.25]
    engine = FakeEngine(answering({"1": 0.45, "2": 0.3, "3": 0.25}))
    _, results = right(self_consistency, engine, n=8)
    for k in (1, 3, 8):
        count = sum(result.curve[k - 1].answer == "1" for result in results)
        assert within(count, TRIALS, majority(k, shares))
    for result in results[:50]:
        spent = list(itertools.accumulate(len(c.tokens) for c in result.candidates))
        assert [point.tokens for point in result.curve] == spent
        assert spent[-1] == result.usage.generated_tokens
        assert result.curve[-1][1:] == (result.answer, result.score)
        assert result.score == sum(c.answer == result.answer for c in result.candidates) / 8


def test_no_answer_has_no_vote():
    def write(rng, before, params):
        return ("no idea" if rng.random() < 0.7 else "the answer is 1"), True

    count, results = right(self_consistency, FakeEngine(write), n=4)
    assert within(count, TRIALS, 1 - 0.7**4)
    none = next(result for result in results if result.answer is None)
    assert (none.score, none.text) == (0.0, "no idea")


def noisy_verifier(gap: float, seed: int):
    rng = random.Random(seed)
    return lambda problem, candidates: [rng.gauss(gap if c.answer == "1" else 0.0, 1.0) for c in candidates]


def best_by_verifier(n: int, p: float, gap: float) -> float:
    """The chance that the highest of n scores is a right sample's: N(gap, 1) with probability p, else N(0, 1)."""
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    below = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
    step, total = 1e-3, 0.0
    for i in range(int(-8 / step), int((gap + 8) / step)):
        x = i * step
        total += n * p * density(x - gap) * (p * below(x - gap) + (1 - p) * below(x)) ** (n - 1) * step
    return total


@pytest.mark.parametrize(("n", "gap"), [(1, 1.0), (4, 0.0), (4, 1.5), (16, 1.5)])
def test_best_of_n_by_a_noisy_verifier(n, gap):
    expected = best_by_verifier(n, 0.3, gap)
    engine = FakeEngine(answering({"1": 0.3, "2": 0.7}), seed=n)
    count, results = right(best_of_n, engine, n=n, scorer=noisy_verifier(gap, seed=1000 + n))
    assert within(count, TRIALS, expected)
    if n == 1 or gap == 0:
        assert math.isclose(expected, 0.3, abs_tol=1e-6)
    else:
        assert expected > 0.5
    assert all(result.score == max(c.score for c in result.candidates) for result in results)


HIGH, LOW = 1.0, 0.375  # whose sums are exact, and for 6 samples equal only where the counts are


def test_weighted_best_of_n():
    """Answers by the sum of their samples' scores: a verifier that says HIGH of 80 % of the right and 30 % of the wrong
    samples. Better than votes alone, and than the best sample."""
    shares, n = [0.35, 0.4, 0.25], 6
    classes = [(answer, high) for answer in range(3) for high in (True, False)]
    chance = [shares[a] * (t if high else 1 - t) for a, high in classes for t in [0.8 if a == 0 else 0.3]]
    expected = 0.0
    for counts, probability in outcomes(n, chance):
        sums = [HIGH * counts[2 * a] + LOW * counts[2 * a + 1] for a in range(3)]
        if sums[0] == max(sums):
            expected += probability / sums.count(sums[0])
    rng = random.Random(5)

    def verifier(problem, candidates):
        return [HIGH if rng.random() < (0.8 if c.answer == "1" else 0.3) else LOW for c in candidates]

    engine = FakeEngine(answering({"1": 0.35, "2": 0.4, "3": 0.25}))
    count, results = right(best_of_n, engine, n=n, scorer=verifier, weighted=True)
    assert within(count, TRIALS, expected)
    assert expected > majority(n, shares) + 0.1
    assert not within(count, TRIALS, majority(n, shares))
    for result in results[:50]:
        own = [c.score for c in result.candidates if c.answer == result.answer]
        assert math.isclose(result.score, sum(own) / sum(c.score for c in result.candidates))
        assert result.text in [c.text for c in result.candidates if c.score == max(own)]


def test_weights_are_not_negative():
    steps = best_of_n(problem(), PARAMS, n=2, scorer=lambda p, cs: [1.0, -0.5], weighted=True)
    with pytest.raises(ValueError, match=r"the scorer gave -0\.5; accepted with weighted=true: 0 or more"):
        drive(FakeEngine(answering({"1": 1.0})), steps)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_a_scorer_that_fails(scores):
    steps = best_of_n(problem(), PARAMS, n=2, scorer=lambda p, cs: scores)
    with pytest.raises(RuntimeError, match="accepted: 2 finite numbers"):
        drive(FakeEngine(answering({"1": 1.0})), steps)
