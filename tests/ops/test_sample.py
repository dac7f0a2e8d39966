"""Sampling beyond the registry's samples: the draws' distribution, and what they may not depend on."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import llmcore
from llmcore import ops, reference
from llmcore.ops import registry
from llmcore.ops.registry import FLOATS
from llmcore.reference import sampling as arithmetic

ISAS = [isa for isa in llmcore._C.cpu_isas() if isa != "cuda_emulated"]  # which has tests/simt/test_sample.py


@contextmanager
def instruction_set(name: str):
    before = llmcore._C.active_cpu_isa()
    assert llmcore._C.set_cpu_isa(name)
    try:
        yield
    finally:
        llmcore._C.set_cpu_isa(before)


def random_calls(dtype: torch.dtype, rows: int, vocab: int, seed: int):
    """Logits of many widths, some masked, some full of ties, and settings of every kind."""
    make = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(rows, generator=make) * (high - low) + low

    def off(share: float) -> torch.Tensor:
        return torch.rand(rows, generator=make) < share

    logits = torch.randn(rows, vocab, generator=make) * uniform(0.01, 8).square()[:, None]
    logits = torch.where(off(0.3)[:, None], logits.round(), logits)
    masked = (torch.rand(rows, vocab, generator=make) < 0.3) & off(0.3)[:, None]
    masked[:, 0] = False
    settings = {
        "temperature": uniform(0.01, 3).masked_fill(off(0.1), 0),
        "top_k": torch.randint(1, vocab + 1, (rows,), generator=make).masked_fill(off(0.4), 0),
        "top_p": uniform(0.001, 1).masked_fill(off(0.4), 1),
        "min_p": uniform(0, 0.5).masked_fill(off(0.6), 0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=make),
        "positions": torch.randint(0, 2**40, (rows,), generator=make),
    }
    return logits.masked_fill(masked, -torch.inf).to(dtype), settings


def assert_equal_bits(got, want):
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1000, 50), (200, 701), (20, 5000), (3, 262144)])
def test_kernel_gives_the_reference_s_bits(dtype, rows, vocab):
    logits, settings = random_calls(dtype, rows, vocab, seed=vocab)
    if rows == 3:
        settings |= {"top_k": torch.tensor([0, 1000, 0]), "top_p": torch.tensor([0.9, 0.5, 1.0])}
    want = reference.sample(logits, **settings)
    for isa in ISAS:
        with instruction_set(isa), llmcore.backend("kernel"):
            assert_equal_bits(ops.sample(logits, **settings), want)


def test_philox_known_answers():
    """Of Random123's test vectors, those whose last counter word is 0, as it is here."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert arithmetic._philox(zero, zero, 4)[0].tolist() == words


def test_noise_is_exponential():
    """The noise's own moments, and its extremes: no time is 0 or infinite."""
    random = torch.randint(0, 2**32, (400_000,), generator=torch.Generator().manual_seed(0))
    times = arithmetic._exponential(random).double()
    assert abs(times.mean() - 1) < 0.01
    assert abs(times.var() - 1) < 0.03
    for low, high in ((0, 1e-3), (1e-3, 0.1), (0.1, 1), (1, 5), (5, 23)):
        share = torch.tensor([-low, -high], dtype=torch.float64).exp()
        expected = float(share[0] - share[1])
        seen = ((times >= low) & (times < high)).double().mean()
        assert abs(seen - expected) < 5 * (expected / 400_000) ** 0.5
    extremes = arithmetic._exponential(torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])).double()
    exact = -torch.tensor([1, 1, 2**31 - 1, 2**31 + 1, 2**32 - 1, 2**32 - 1], dtype=torch.float64).div(2**32).log()
    assert ((extremes - exact).abs() / exact).max() < 2e-7


def test_arithmetic_is_as_exact_as_it_says():
    make = torch.Generator().manual_seed(0)
    x = torch.cat([-torch.rand(300_000, generator=make) * 86, -torch.rand(100_000, generator=make)])
    exact = x.double().exp()
    assert ((arithmetic._exp_nonpositive(x) - exact).abs() / exact).max() < 1.5e-7
    assert arithmetic._exp_nonpositive(torch.tensor([0.0, -86.1, -torch.inf, torch.nan])).tolist() == [1, 0, 0, 0]
    y = torch.rand(300_000, generator=make) * 4e6 + 1
    assert ((arithmetic._log(y) - y.double().log()).abs() / y.double().log()).max() < 1.5e-7
    random = torch.randint(0, 2**32, (300_000,), generator=make) | 1
    exact = -torch.log1p((random - 2**32).double() / 2**32)
    assert ((arithmetic._exponential(random) - exact).abs() / exact).max() < 2e-7


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 30, 5000, 131072])
def test_logprobs_are_those_of_log_softmax(dtype, vocab):
    logits, settings = random_calls(dtype, 8, vocab, seed=3)
    tokens, logprobs = ops.sample(logits, **settings)
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert ((logprobs - exact).abs() <= 4e-7 * exact.abs() + 4e-7).all()


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 6},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.08},
]


def chi_squared(tokens: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """(the statistic, its degrees of freedom); a token of probability 0 fails."""
    counts = torch.bincount(tokens, minlength=p.numel()).double()
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * tokens.numel()
    assert expected.min() > 5
    return float(((counts[p > 0] - expected) ** 2 / expected).sum()), int((p > 0).sum()) - 1


def assert_follows(tokens: torch.Tensor, p: torch.Tensor) -> None:
    statistic, freedom = chi_squared(tokens, p)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8, f"{statistic} with {freedom} degrees of freedom"


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings, vary):
    """Neighbouring seeds, and neighbouring positions of one seed, draw independently."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(4))
    numbers = torch.arange(50_000)
    tokens, _ = ops.sample(logits.expand(50_000, -1), **settings, **{vary: numbers})
    p = ops.sampling_probabilities(logits, **settings)[0]
    assert_follows(tokens, p)
    pairs = (p[:, None] * p).flatten()  # of a token and the next one: 25,000 of them
    if p.min() == 0 and (pairs[pairs > 0] * 25_000).min() > 5:
        assert_follows(tokens[::2] * 20 + tokens[1::2], pairs)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[5]], ids=str)
def test_the_peer_that_benchmarks_time_draws_from_the_same_distribution(settings):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(4))
    rows = 50_000
    tensors = {k: torch.full((rows,), v) for k, v in settings.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = registry["sample"].peer(logits.expand(rows, -1).contiguous(), **tensors)
    assert_follows(tokens, ops.sampling_probabilities(logits, **settings)[0])


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """One in 2,000, behind a token that has nearly all the probability, and in a vocabulary of many."""
    logits = torch.full((1, 4000), -16.0)
    logits[0, 2500] = 0
    logits[0, 77] = torch.tensor(1 / 2000).log()
    tokens, _ = ops.sample(logits.expand(200_000, -1), seeds=torch.arange(200_000))
    p = logits.double().softmax(-1)[0]
    for ids in ([77], [i for i in range(4000) if i not in (77, 2500)]):
        expected = float(p[ids].sum()) * 200_000
        assert abs(torch.isin(tokens, torch.tensor(ids)).sum() - expected) < 5 * expected**0.5


def test_a_row_depends_on_nothing_beside_it():
    logits, settings = random_calls(torch.float32, 60, 300, seed=5)
    whole = ops.sample(logits, **settings)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = ops.sample(logits[order], **{k: v[order] for k, v in settings.items()})
    assert_equal_bits(shuffled, tuple(t[order] for t in whole))
    for row in range(5):
        alone = ops.sample(logits[row : row + 1], **{k: v[row : row + 1] for k, v in settings.items()})
        assert_equal_bits(alone, tuple(t[row : row + 1] for t in whole))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_equal_bits(ops.sample(logits, **settings), whole)
    finally:
        torch.set_num_threads(threads)


def test_more_tokens_of_no_probability_change_nothing():
    """A token's noise is its own, whatever the vocabulary."""
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(6))
    longer = torch.cat([logits, torch.full((50, 33), -torch.inf)], -1)
    draws = {"seeds": torch.arange(50), "top_p": 0.9}
    assert_equal_bits(ops.sample(longer, **draws), ops.sample(logits, **draws))


def test_seeds_and_positions_make_other_draws():
    logits = torch.zeros(1, 100_000)
    drawn = {
        int(ops.sample(logits, seeds=seed, positions=position)[0])
        for seed in (0, 1, -1, 2**32, 2**62)
        for position in (0, 1, 2**32, 2**60)
    }
    assert len(drawn) == 20


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_distribution(bad, temperature):
    logits = torch.zeros(4, 37)
    logits[2, 35] = bad
    message = r"the logits of row 2 hold NaN or \+inf, or are all -inf; accepted: finite logits, and -inf beside"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            reference.sample(logits, temperature=temperature)
        for isa in ISAS:
            with instruction_set(isa), pytest.raises(RuntimeError, match=message):
                ops.sample(logits, temperature=temperature)
        logits[2] = -torch.inf


def test_refuses():
    logits = torch.zeros(3, 5)
    for settings, message in (
        ({"temperature": -1.0}, r"temperature is -1.0; accepted: 0 \(greedy\) or above"),
        (
            {"temperature": torch.tensor([1.0, torch.nan, 1])},
            r"sample: temperature\[1\] is nan; accepted: 0 \(greedy\)",
        ),
        ({"top_k": torch.tensor([0, 1, -3])}, r"sample: top_k\[2\] is -3; accepted: 0 \(off\) or above"),
        ({"top_k": torch.ones(3)}, "sample: top_k has dtype float32; accepted: int32, int64"),
        ({"top_p": 0.0}, "top_p is 0.0; accepted: above 0"),
        ({"top_p": torch.tensor([1.0, 1, 1.5])}, r"sample: top_p\[2\] is 1.5; accepted: above 0, to 1 \(off\)"),
        ({"min_p": torch.ones(2)}, r"sample: min_p has shape \(2,\); expected \(3\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sample(logits, **settings)
    with pytest.raises(RuntimeError, match=r"sample: logits has shape \(5,\); expected \(rows, vocab\)"):
        ops.sample(torch.zeros(5))
    with pytest.raises(RuntimeError, match="the vocabulary has 0 tokens; accepted: 1 to 4194304"):
        ops.sample(torch.zeros(2, 0))
    with pytest.raises((NotImplementedError, RuntimeError), match="sample has no gradient"):
        ops.sample(torch.zeros(2, 4, requires_grad=True))[1].sum().backward()


def test_penalties_by_hand():
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0, 0.5]])
    ops.apply_penalties_(
        logits, torch.tensor([[0, 1, -1, 2, 2, 0]]), torch.tensor([2]), repetition=2.0, presence=0.5, frequency=0.25
    )
    # 0: prompt, once in the output; 1: prompt; 2: twice in the output
    assert logits.tolist() == [[2 / 2 - 0.25 - 0.5, -2 * 2, 1 / 2 - 2 * 0.25 - 0.5, 4, 0.5]]


def test_penalties_refuse():
    logits, tokens, lens = torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3])
    for change, message in (
        ({"tokens": tokens + 5}, r"apply_penalties_: tokens\[0, 0\] is 5; accepted: 0 to 4, or -1 for padding"),
        ({"tokens": tokens - 2}, r"apply_penalties_: tokens\[0, 0\] is -2; accepted: 0 to 4"),
        ({"tokens": tokens[:1]}, r"apply_penalties_: tokens has shape \(1, 3\); expected \(2, 3\)"),
        ({"prompt_lens": lens + 1}, r"apply_penalties_: prompt_lens\[1\] is 4; accepted: 0 to max_len = 3"),
        ({"repetition": torch.tensor([1.0, 0])}, r"apply_penalties_: repetition\[1\] is 0; accepted: above 0"),
        ({"presence": float("nan")}, r"apply_penalties_: presence\[0\] is -?nan; accepted: finite"),
        ({"logits": torch.zeros(5).expand(2, 5)}, "apply_penalties_: logits has overlapping elements"),
    ):
        arguments = {"logits": logits, "tokens": tokens, "prompt_lens": lens} | change
        with pytest.raises(RuntimeError, match=message):
            ops.apply_penalties_(**arguments)
    assert not logits.any()
