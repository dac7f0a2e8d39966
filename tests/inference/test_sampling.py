"""The distribution that tokens come from; the drawing is tested in tests/ops/test_sample.py."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops
from llmcore.inference import SamplingParams
from llmcore.inference.draw import Row, draw_rows
from llmcore.inference.sampling import probabilities
from llmcore.inference.sequence import Request, Sequence
from llmcore.inference.text import TextStream

P = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]], dtype=torch.float64)


def kept(**settings):
    """Which tokens of P stay; what stays must keep its proportions and sum to 1."""
    p = probabilities(P.log(), **settings)
    on = p > 0
    torch.testing.assert_close(p[on], P[on] / P[on].sum())
    return on.nonzero()[:, 1].tolist()


def test_unfiltered_is_softmax():
    logits = torch.randn(3, 50)
    torch.testing.assert_close(probabilities(logits), logits.double().softmax(-1))
    torch.testing.assert_close(probabilities(logits, temperature=0.7), (logits.double() / 0.7).softmax(-1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "top_p": 0.57}, [1]),  # of the two left, token 1 has 0.4 / 0.7 = 0.571
        ({"top_k": 2, "top_p": 0.58}, [1, 3]),
        ({"temperature": 1.0, "top_k": 4, "min_p": 0.3}, [1, 3, 4]),
    ],
    ids=str,
)
def test_filters(settings, expected):
    assert kept(**settings) == expected


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.15}],
    ids=str,
)
def test_filters_equal_those_of_transformers(settings):
    transformers = pytest.importorskip("transformers")
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    logits = torch.randn(50, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits
    for name, value in settings.items():  # in transformers' own order
        expected = warpers[name](value)(None, expected)
    p = probabilities(logits, **settings)
    torch.testing.assert_close(p, expected.softmax(-1))
    assert 1 < (p > 0).sum(-1).double().mean() < 59


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -3.0]])
    assert probabilities(logits, temperature=0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    tiny = probabilities(logits[1:], temperature=1e-310)
    assert tiny.tolist() == [[1, 0, 0, 0]]


def test_top_k_takes_lower_ids_of_equals():
    assert probabilities(torch.zeros(1, 6), top_k=2).tolist() == [[0.5, 0.5, 0, 0, 0, 0]]


def test_masked_tokens_have_no_probability():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])
    p = probabilities(logits, temperature=2.0, top_p=0.9)
    assert p.tolist() == [[0, 0.5, 0, 0.5]]


def draw(logits, seeds, position, **settings):
    """Tokens and log-probabilities of requests that have `position` tokens."""
    rows = []
    for at, seed in enumerate(seeds):
        request = Request("a", [0] * position, SamplingParams(logprobs=0, **settings))
        rows.append(Row(Sequence(at, request, 0, list(request.prompt), seed, TextStream(None)), 0, at))
    return draw_rows(logits, rows)


def test_draws_with_seeds_and_positions():
    logits = torch.zeros(3, 1000)
    tokens, _ = draw(logits, [-5, -5, -(2**63)], 1)
    assert tokens[0] == tokens[1] != tokens[2]
    expected, _ = ops.sample(logits, seeds=torch.tensor([-5, -5, -(2**63)]), positions=1)
    assert tokens == expected.tolist()


def test_draws_by_its_settings():
    logits = P.log().expand(200, -1)
    tokens, told = draw(logits, range(200), 1, top_k=3)
    assert set(tokens) == {1, 3, 4}
    logprobs = torch.tensor([t.logprob for t in told])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens].float())
    assert set(draw(logits, range(200), 1, temperature=0)[0]) == {1}
    assert set(draw(logits, range(200), 1, top_p=0.5)[0]) == {1, 3}
    assert set(draw(logits, range(200), 1, min_p=0.3)[0]) == {1, 3, 4}


def test_a_bad_row_on_a_gpu(monkeypatch):
    """There the op marks it by token -1."""
    monkeypatch.setattr(ops, "sample", lambda logits, **_: (torch.tensor([4, -1]), torch.zeros(2)))
    tokens, told = draw(torch.zeros(2, 5), [0, 1], 1)
    assert tokens == [4, None]
    assert told[1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0; accepted: 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; accepted: 1 or more, or None"),
        ({"top_k": 2.5}, "top_k is 2.5; accepted: 1 or more, or None"),
        ({"top_p": 0.0}, "top_p is 0.0; accepted: above 0, to 1, or None"),
        ({"min_p": 1.5}, "min_p is 1.5; accepted: 0 to 1, or None"),
    ],
    ids=str,
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        probabilities(torch.zeros(1, 4), **settings)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_refuses_logits_that_are_no_distribution(bad, temperature):
    logits = torch.zeros(3, 4)
    logits[1] = float("-inf")
    logits[1, 2] = float(bad)
    with pytest.raises(RuntimeError, match=r"logits of row 1 hold NaN or \+inf, or are all -inf"):
        probabilities(logits, temperature=temperature)
    tokens, told = draw(logits, [1, 2, 3], 1, temperature=temperature)
    assert [t is None for t in tokens] == [t is None for t in told] == [False, True, False]
