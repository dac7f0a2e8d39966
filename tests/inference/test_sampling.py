"""The distribution that tokens come from, and the drawing."""

from __future__ import annotations

import pytest
import torch

from llmcore.inference.sampling import draw, probabilities

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


def test_draw_inverts_the_distribution():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert draw(p, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_draw_follows_the_distribution():
    """Frequencies of 100,000 draws by a chi-squared test (4 degrees of freedom, 99.99 %)."""
    uniform = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(P.expand(100_000, -1), uniform), minlength=5)
    expected = P[0] * 100_000
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_draw_never_takes_a_token_of_no_probability():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200, 300, dtype=torch.float64, generator=generator)
    p = torch.where(p < 0.9, 0, p)
    p /= p.sum(-1, keepdim=True)
    edge = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    for uniform in (torch.zeros(200, dtype=torch.float64), edge):
        assert (p.gather(1, draw(p, uniform)[:, None]) > 0).all()


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
    with pytest.raises(ValueError, match=f"logits of row 1 have the maximum {bad}; accepted: a finite one"):
        probabilities(logits, temperature=temperature)
