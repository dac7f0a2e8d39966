"""Mixture of experts against a loop over tokens and experts, and its two ways of balancing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore.layers import MoE


def by_hand(layer: MoE, x):
    """Every expert on every token, weighted by the router: (hidden, chosen experts (tokens, top_k))."""
    options = layer.routing
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ layer.router.weight.T
    scores = logits.softmax(-1) if options["score"] == "softmax" else logits.sigmoid()
    choice = scores if layer.expert_bias is None else scores + layer.expert_bias
    chosen = choice.topk(layer.top_k, -1).indices
    weights = scores.gather(-1, chosen)
    if options["renormalize"]:
        weights = weights / weights.sum(-1, keepdim=True)
    mix = torch.zeros_like(scores).scatter(-1, chosen, weights * options["scale"])
    hidden = torch.zeros_like(tokens)
    for expert in range(layer.num_experts):
        gate, up = (tokens @ layer.gate_up[expert].T).chunk(2, -1)
        hidden = hidden + mix[:, expert, None] * ((F.silu(gate) * up) @ layer.down[expert].T)
    if layer.shared is not None:
        hidden = hidden + layer.shared(tokens)
    return hidden.view_as(x), chosen


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 31, 16), (40, 16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_experts": 2},
        {"score": "sigmoid", "scale": 2.5, "balancing": "bias"},
        {"renormalize": False, "balancing": "none"},
    ],
    ids=str,
)
def test_equals_every_expert_on_every_token(options, shape):
    torch.manual_seed(0)
    layer = MoE(16, 12, 6, 2, **options)
    torch.nn.init.normal_(layer.router.weight)
    if layer.expert_bias is not None:
        layer.expert_bias.normal_()
    x = torch.randn(shape, requires_grad=True)
    seed = torch.randn(shape)
    leaves = [x, *layer.parameters()]
    out = layer(x)
    expected, chosen = by_hand(layer, x)
    torch.testing.assert_close(out.hidden, expected, rtol=1e-4, atol=1e-6)
    assert out.expert_load.tolist() == torch.bincount(chosen.flatten(), minlength=6).tolist()
    assert int(out.expert_load.sum()) == chosen.numel()
    got, wanted = (torch.autograd.grad(h, leaves, seed) for h in (out.hidden, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_every_expert_has_a_gradient():
    torch.manual_seed(1)
    layer = MoE(16, 12, 8, 2, shared_experts=1)
    out = layer(torch.randn(4, 64, 16))
    assert (out.expert_load > 0).all()
    (out.hidden.square().sum() + out.aux_loss).backward()
    for weight in (layer.gate_up, layer.down, layer.router.weight):
        assert (weight.grad.flatten(1).abs().amax(1) > 0).all()


def test_groups_limit_the_choice():
    torch.manual_seed(2)
    layer = MoE(16, 12, 8, 3, num_groups=4, topk_groups=2)
    torch.nn.init.normal_(layer.router.weight)
    free = MoE(16, 12, 8, 3)
    free.load_state_dict(layer.state_dict())
    x = torch.randn(50, 16)

    def groups(moe):  # how many groups of two experts each token uses
        return [int((moe(row[None]).expert_load.view(4, 2).sum(1) > 0).sum()) for row in x]

    assert max(groups(layer)) == 2
    assert max(groups(free)) == 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_loss(score):
    """Its value by the formula of arXiv 2101.03961, and 1 times its weight in balance."""
    torch.manual_seed(3)
    layer = MoE(16, 12, 4, 2, score=score, aux_weight=0.5)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(30, 16)
    out = layer(x)
    logits = x @ layer.router.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = 0.5 * 4 * (out.expert_load / 60 * share).sum()
    torch.testing.assert_close(out.aux_loss, expected)
    layer.router.weight.data.zero_()  # equal scores: whatever is chosen, P_e = 1/4
    torch.testing.assert_close(layer(x).aux_loss, torch.tensor(0.5))


def test_scores_that_vanish_have_a_finite_loss_and_gradient():
    layer = MoE(16, 12, 4, 2, score="sigmoid")
    layer.router.weight.data.fill_(-100.0)  # sigmoid(-1600) is 0
    x = torch.ones(3, 16, requires_grad=True)
    out = layer(x)
    assert out.aux_loss == 0
    (out.hidden.sum() + out.aux_loss).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.router.weight.grad).all()


def test_descent_on_aux_loss_balances():
    torch.manual_seed(4)
    layer = MoE(16, 12, 8, 1, aux_weight=1.0)
    torch.nn.init.normal_(layer.router.weight, std=0.1)
    layer.router.weight.data[0] += 0.3
    x = torch.randn(512, 16) + 0.5
    before = layer(x).expert_load.max()
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.3)
    for _ in range(60):
        layer(x).aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layer(x).expert_load.max()
    assert before > 300
    assert after < before / 2


def test_bias_moves_toward_balance():
    torch.manual_seed(5)
    layer = MoE(16, 12, 4, 1, score="sigmoid", balancing="bias", bias_rate=0.01)
    layer.update_expert_bias(torch.tensor([10, 2, 4, 4]))  # the mean is 5
    torch.testing.assert_close(layer.expert_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    layer.update_expert_bias(torch.tensor([5, 5, 5, 5]))
    torch.testing.assert_close(layer.expert_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))

    torch.nn.init.normal_(layer.router.weight, std=0.1)
    x = torch.randn(512, 16) + 0.5
    first = layer(x)
    assert first.aux_loss is None
    layer.bias_rate = 0.001  # the last steps swing around balance by about the rate
    for _ in range(300):
        layer.update_expert_bias(layer(x).expert_load)
    assert first.expert_load.max() > 200
    assert layer(x).expert_load.max() < 1.1 * 512 / 4


def test_bias_changes_the_choice_not_the_weight():
    torch.manual_seed(6)
    layer = MoE(16, 12, 4, 4, balancing="bias")  # every expert is chosen: a bias can't matter
    x = torch.randn(20, 16)
    before = layer(x).hidden
    layer.expert_bias.copy_(torch.randn(4))
    torch.testing.assert_close(layer(x).hidden, before)


def test_bias_stays_float32_and_is_saved():
    layer = MoE(8, 8, 4, 2, balancing="bias")
    layer.expert_bias.fill_(0.1234567)
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert torch.equal(layer.state_dict()["expert_bias"], torch.full((4,), 0.1234567))
    assert layer(torch.randn(5, 8, dtype=torch.bfloat16)).hidden.dtype == torch.bfloat16
    assert "expert_bias" not in MoE(8, 8, 4, 2).state_dict()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_refuses_what_is_not_finite(score, bad):
    layer = MoE(8, 8, 4, 2, score=score)
    x = torch.randn(3, 5, 8)
    x[1, 2, 3] = bad
    with pytest.raises(FloatingPointError, match="the router's scores of token 7 are not finite"):
        layer(x)


def test_refuses():
    with pytest.raises(ValueError, match="balancing is 'loss'; accepted: 'aux_loss', 'bias', 'none'"):
        MoE(8, 8, 4, 2, balancing="loss")
    with pytest.raises(ValueError, match="top_k is 5; accepted: 1 to num_experts = 4"):
        MoE(8, 8, 4, 5)
    with pytest.raises(ValueError, match="shared_experts is -1; accepted: 0 or more"):
        MoE(8, 8, 4, 2, shared_experts=-1)
    with pytest.raises(ValueError, match="activation is 'gelu'; accepted: 'swiglu', 'geglu'"):
        MoE(8, 8, 4, 2, activation="gelu")
    with pytest.raises(RuntimeError, match="balancing is 'none'"):
        MoE(8, 8, 4, 2, balancing="none").update_expert_bias(torch.ones(4))
