"""The mixture-of-experts kernels where the registry's samples, which are small, do not lead: sorts past one CTA's part
of the tokens, orders that are easily lost, scores that are not numbers."""

from __future__ import annotations

import pytest
import torch

from llmcore import ops, reference
from llmcore.ops import Sample, registry
from tests.ops.checks import check_sample
from tests.simt.emulation import emulator

# Around a warp's batch of 32 pairs, a CTA's 32 tokens, and the emulated device's 3 CTAs.
TOKENS = (1, 31, 32, 33, 64, 65, 96, 97, 1000)


def adversarial(tokens: int, top_k: int, num_experts: int):
    """Ids (tokens, top_k) whose order is easily lost."""
    pairs = torch.arange(tokens * top_k)
    yield "all to the first", torch.zeros_like(pairs)
    yield "all to the last", torch.full_like(pairs, num_experts - 1)
    yield "alternating", pairs % 2 * (num_experts - 1)
    yield "runs of 32", pairs // 32 % num_experts
    yield "falling", (num_experts - 1 - pairs) % num_experts
    yield "all but one", (pairs == tokens * top_k // 2) * (num_experts - 1)
    yield "random", torch.randint(num_experts, pairs.shape, generator=torch.Generator().manual_seed(tokens))


def assert_stable_sort(experts, num_experts, offsets, row_of, token_of):
    """From the definition alone."""
    tokens, top_k = experts.shape
    pairs = row_of.flatten().long().argsort()  # of each row
    assert torch.equal(row_of.flatten().sort().values, torch.arange(tokens * top_k, dtype=torch.int32))
    sorted_ids = experts.flatten()[pairs]
    assert (sorted_ids.diff() >= 0).all()
    assert ((sorted_ids.diff() > 0) | (pairs.diff() > 0)).all(), "rows of one expert are out of order"
    assert torch.equal(token_of, (pairs // top_k).int())
    bounds = torch.searchsorted(sorted_ids.contiguous(), torch.arange(num_experts + 1, dtype=torch.int32))
    assert torch.equal(offsets, bounds.int())


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 2), (3, 5), (8, 128), (2, 1500)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sort_is_stable(tokens, top_k, num_experts, emulated):
    for label, ids in adversarial(tokens, top_k, num_experts):
        experts = ids.view(tokens, top_k).int()
        offsets, row_of, token_of = ops.moe_sort(experts, num_experts)
        try:
            assert_stable_sort(experts, num_experts, offsets, row_of, token_of)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error


@pytest.mark.parametrize("num_experts", [7, 25000])
def test_sort_without_tokens(num_experts, emulated):
    offsets, row_of, token_of = ops.moe_sort(torch.empty(0, 4, dtype=torch.int32), num_experts)
    assert torch.equal(offsets, torch.zeros(num_experts + 1, dtype=torch.int32))
    assert row_of.shape == (0, 4)
    assert token_of.shape == (0,)


def test_sort_whose_table_is_in_global_memory(emulated):
    experts = torch.randint(25000, (70, 2), generator=torch.Generator().manual_seed(0)).int()
    assert_stable_sort(experts, 25000, *ops.moe_sort(experts, 25000))


@pytest.mark.parametrize(("score", "with_bias"), [("softmax", False), ("sigmoid", True)])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1000, 128, 8), (97, 512, 32), (200, 30, 3)])
def test_routing_past_one_cta(tokens, num_experts, top_k, score, with_bias, emulated):
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, num_experts, generator=make)
    options = {"score": score} | ({"bias": torch.randn(num_experts, generator=make)} if with_bias else {})
    check_sample(registry["moe_route"], Sample("", (logits, top_k), options, (0,)))
    routing = ops.moe_route(logits, top_k, **options)
    assert_stable_sort(routing.experts, num_experts, *routing[3:])


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "topk_groups": 2}])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 3), (64, 4), (600, 4), (80, 40)])
def test_tokens_whose_scores_are_not_numbers(num_experts, top_k, score, groups, emulated):
    """On a device nobody looks: such a token has the first experts, and NaN as weights; the others are as ever."""
    logits = torch.randn(40, num_experts, generator=torch.Generator().manual_seed(0))
    expected = ops.Routing(*reference.moe_route(logits, top_k, score=score, **groups))
    bad = torch.tensor([0, 7, 33])
    logits[bad, torch.tensor([0, num_experts - 1, 5])] = torch.nan
    if score == "softmax":
        logits[7], logits[33, 5] = -torch.inf, torch.inf
    routing = ops.moe_route(logits, top_k, score=score, **groups)
    good = torch.ones(40, dtype=torch.bool)
    good[bad] = False
    assert torch.equal(routing.experts[bad], torch.arange(top_k, dtype=torch.int32).expand(3, -1))
    assert routing.weights[bad].isnan().all()
    assert torch.equal(routing.experts[good], expected.experts[good])
    torch.testing.assert_close(routing.weights[good], expected.weights[good])
    assert_stable_sort(routing.experts, num_experts, *routing[3:])


@pytest.mark.parametrize("num_experts", [510, 512])
def test_groups_that_a_small_card_has_no_room_for(num_experts):
    """A warp's keys of 512 experts and 256 groups take 3 KiB: in all, 98 KiB of shared memory."""
    logits = torch.randn(40, num_experts, generator=torch.Generator().manual_seed(0))
    options = {"num_groups": num_experts // 2, "topk_groups": 20}
    for shared in (97, 99):
        with emulator(shared_bytes=shared * 1024):
            check_sample(registry["moe_route"], Sample("", (logits, 6), options, (0,)))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "num_groups"), [(64, 8), (66, 33), (600, 6)])
def test_ties_within_and_between_groups(num_experts, num_groups, score, emulated):
    """Few values: the two best of a group are often equal, and so are groups."""
    logits = torch.randint(3, (20, num_experts), generator=torch.Generator().manual_seed(0)).float()
    options = {"score": score, "num_groups": num_groups, "topk_groups": 3}
    check_sample(registry["moe_route"], Sample("", (logits, 5), options, (0,)))
