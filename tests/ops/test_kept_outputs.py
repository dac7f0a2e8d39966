"""Outputs that an op keeps for its backward pass have no gradient, and none of zeros is made for them."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llmcore import ops


def _grouped_glu(leaf):
    x, gate_up = leaf(12, 16), leaf(3, 40, 16)
    return ops.grouped_glu(x, gate_up, torch.tensor([0, 4, 9, 12], dtype=torch.int32)).sum()


def _loss(reduction):
    def loss(leaf):
        return ops.linear_cross_entropy(leaf(10, 16), leaf(30, 16), torch.arange(10), reduction=reduction).sum()

    return loss


def _moe_dispatch(leaf):
    routing = ops.moe_route(torch.randn(10, 4), 2)
    return ops.moe_dispatch(leaf(10, 16), routing.experts, 4)[0].sum()


@pytest.mark.parametrize(
    "call", [_grouped_glu, _loss("mean"), _loss("none"), _moe_dispatch], ids=["grouped_glu", "mean", "none", "dispatch"]
)
def test_no_gradient_of_zeros(call):
    result = call(lambda *shape: torch.randn(*shape, requires_grad=True))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        result.backward()
    names = {event.name for event in record.events()}
    assert any("Backward" in name for name in names)
    assert not names & {"aten::zeros", "aten::zeros_like", "aten::zero_", "aten::new_zeros"}
