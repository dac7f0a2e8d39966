"""What the mixture-of-experts ops say to bad input, and promises that comparing with the reference can't show."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llmcore
from llmcore import ops

LOGITS = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "tanh"}, "score is 'tanh'; accepted: 'softmax', 'sigmoid'"),
        ({"top_k": 0}, "top_k is 0; accepted: 1 to 8"),
        ({"top_k": 9}, "top_k is 9; accepted: 1 to 8"),
        ({"top_k": 5, "num_groups": 4, "topk_groups": 2}, "top_k is 5; accepted: 1 to 4"),
        ({"num_groups": 3}, "num_groups is 3; it must divide the number of experts, 8"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups is 5; accepted: 1 to num_groups"),
        ({"num_groups": 4, "topk_groups": 0}, "topk_groups is 0"),
        ({"bias": torch.zeros(7)}, r"bias has shape \(7,\); expected \(8\)"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias has dtype bfloat16; expected float32"),
        ({"bias": torch.tensor([0.0] * 5 + [float("nan")] + [0.0] * 2)}, r"bias\[5\] is -?nan"),
        ({"scale": float("nan")}, r"scale is -?nan; it must be finite"),
        ({"logits": LOGITS[0]}, r"logits has shape \(8,\); expected \(tokens, num_experts\)"),
        ({"logits": LOGITS[:, :0]}, r"logits has shape \(3, 0\)"),
    ],
)
def test_route_refuses(arguments, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.moe_route(**{"logits": LOGITS, "top_k": 2, **arguments})


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("token", [0, 7, 4099])
def test_route_names_the_first_token_with_nan(score, token):
    logits = torch.zeros(5000, 9)
    logits[token, 8] = logits[token + 400, 0] = float("nan")
    with pytest.raises(RuntimeError, match=f"the logits of token {token} hold NaN"):
        ops.moe_route(logits, 2, score=score)


def test_route_takes_infinities_where_they_mean_something():
    inf = float("inf")
    with pytest.raises(RuntimeError, match="token 1"):
        ops.moe_route(torch.tensor([[0.0, -inf], [inf, 0.0]]), 1)
    with pytest.raises(RuntimeError, match="token 0"):
        ops.moe_route(torch.full((1, 4), -inf), 1)
    _, experts, scores, *_ = ops.moe_route(torch.tensor([[-inf, 0.0, inf]]), 1, score="sigmoid")
    assert experts.item() == 2
    assert scores.tolist() == [[0.0, 0.5, 1.0]]


def test_route_backward_refuses_an_expert_that_is_not_there():
    _, experts, scores, *_ = ops.moe_route(LOGITS, 2)
    experts[1, 1] = 8
    with pytest.raises(RuntimeError, match=r"experts\[1, 1\] is 8; accepted: 0 to 7"):
        torch.ops.llmcore.moe_route_backward(None, scores, scores, experts, False, True, 1.0)


def test_route_breaks_ties_by_the_lower_index():
    experts = ops.moe_route(torch.zeros(2, 12), 5, num_groups=4, topk_groups=2).experts
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_route_does_not_choose_from_other_groups():
    """Negative biased scores in the chosen groups still beat those of the groups left out."""
    bias = torch.tensor([-1.0, -9, -9, -9, -2, -2, -2, -2])  # group 0: -10 + ..., group 1: -4 + ...
    experts = ops.moe_route(torch.zeros(1, 8), 3, score="sigmoid", bias=bias, num_groups=2, topk_groups=1).experts
    assert experts.tolist() == [[4, 5, 6]]


def test_bias_changes_the_choice_but_not_the_weights():
    bias = torch.zeros(8)
    bias[0] = 10
    weights, experts, scores, *_ = ops.moe_route(LOGITS, 2, bias=bias, renormalize=False)
    assert experts.tolist() == [[0, 7]] * 3
    assert torch.equal(weights, scores[:, [0, 7]])


X = torch.arange(12.0).view(3, 4)
IDS = torch.tensor([[0, 1], [2, 1], [0, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "ids", "num_experts", "message"),
    [
        (X, IDS, 2, r"experts\[1, 0\] is 2; accepted: 0 to 1"),
        (X, -IDS, 3, r"experts\[0, 1\] is -1; accepted: 0 to 2"),
        (X, IDS.long(), 3, "experts has dtype int64; expected int32"),
        (X, IDS[:2], 3, r"experts has shape \(2, 2\), but x has 3 tokens"),
        (X, IDS, 0, "num_experts is 0; it must be at least 1"),
        (X[0], IDS, 3, r"x has shape \(4,\); expected \(tokens, dim\)"),
        (X.int(), IDS, 3, "int32"),
    ],
)
def test_dispatch_refuses(x, ids, num_experts, message):
    with llmcore.backend("kernel"), pytest.raises((RuntimeError, TypeError), match=message):
        ops.moe_dispatch(x, ids, num_experts)


def test_combine_refuses():
    y, _, row_of = ops.moe_dispatch(X, IDS, 3)
    weights = torch.rand(3, 2)
    outside, twice = row_of.clone(), row_of.clone()
    outside[2, 1], twice[2, 1] = 6, twice[0, 0]
    for arguments, message in (
        ((y, weights, outside), r"row_of\[2, 1\] is 6; accepted: 0 to 5"),
        ((y, weights, twice), r"row_of\[2, 1\] is 0, which an earlier assignment holds"),
        ((y[:5], weights, row_of), r"y_sorted has shape \(5, 4\); row_of \(3, 2\) asks for 6 rows"),
        ((y, weights.bfloat16(), row_of), "weights has dtype bfloat16; expected float32"),
        ((y, weights[:2], row_of), r"weights has shape \(2, 2\); expected \(3, 2\)"),
        ((y, weights, row_of.long()), "row_of has dtype int64; expected int32"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=message):
            ops.moe_combine(*arguments)
    with pytest.raises(RuntimeError, match=r"row_of\[2, 1\] is 6"):
        torch.ops.llmcore.moe_dispatch_backward(y, outside)
    with pytest.raises(RuntimeError, match=r"row_of\[2, 1\] is 6"):
        torch.ops.llmcore.moe_combine_backward(X, y, weights, outside)


def test_combine_undoes_dispatch():
    y, offsets, row_of = ops.moe_dispatch(X, IDS, 3)
    assert offsets.tolist() == [0, 2, 4, 6]
    assert torch.equal(ops.moe_combine(y, torch.full((3, 2), 0.5), row_of), X)


WEIGHT = torch.ones(3, 5, 4)


def offsets_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "weight", "offsets", "message"),
    [
        (X, WEIGHT, offsets_of(0, 2, 1, 3), r"offsets\[2\] is 1, below 2 before it; offsets must not fall"),
        (X, WEIGHT, offsets_of(1, 2, 2, 3), r"offsets\[0\] is 1; offsets start with 0"),
        (X, WEIGHT, offsets_of(0, 2, 2, 2), "offsets ends with 2, but x has 3 rows"),
        (X, WEIGHT, offsets_of(0, 2, 3), r"offsets has shape \(3,\); expected \(4\)"),
        (X, WEIGHT, offsets_of(0, 2, 2, 3).long(), "offsets has dtype int64; expected int32"),
        (X, WEIGHT.bfloat16(), offsets_of(0, 2, 2, 3), "weight has dtype bfloat16, but x has float32"),
        (X, WEIGHT[:, :, :3], offsets_of(0, 2, 2, 3), r"x has shape \(3, 4\), but weight has shape \(3, 5, 3\)"),
        (X, WEIGHT[0], offsets_of(0, 3), r"weight has shape \(5, 4\); expected \(num_experts, n, k\)"),
    ],
)
def test_grouped_gemm_refuses(x, weight, offsets, message):
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_gemm(x, weight, offsets)


def test_grouped_gemm_gradient_is_0_without_rows():
    weight = WEIGHT.clone().requires_grad_()
    ops.grouped_gemm(X, weight, offsets_of(0, 2, 2, 3)).sum().backward()
    assert (weight.grad[1] == 0).all()
    assert (weight.grad[0] == X[:2].sum(0)).all()


GATE_UP = torch.linspace(-1, 1, 2 * 6 * 4).view(2, 6, 4)
TOKEN_OF = torch.tensor([0, 2, 1, 0, 1, 2], dtype=torch.int32)
ROW_OF = torch.tensor([[3, 0], [2, 4], [1, 5]], dtype=torch.int32)
GATHERED = {"token_of": TOKEN_OF, "row_of": ROW_OF}


def changed(t: torch.Tensor, where, value: int) -> torch.Tensor:
    t = t.clone()
    t[where] = value
    return t


@pytest.mark.parametrize("op", [ops.grouped_gemm, ops.grouped_glu])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_of": TOKEN_OF}, "token_of and row_of go together; give both or neither"),
        ({"row_of": ROW_OF}, "token_of and row_of go together; give both or neither"),
        (GATHERED | {"token_of": TOKEN_OF.long()}, "token_of has dtype int64; expected int32"),
        (GATHERED | {"row_of": ROW_OF.long()}, "row_of has dtype int64; expected int32"),
        (GATHERED | {"token_of": TOKEN_OF[None]}, r"token_of has shape \(1, 6\); expected \(rows,\)"),
        (GATHERED | {"row_of": ROW_OF[0]}, r"row_of has shape \(2,\); expected \(tokens, top_k\)"),
        (GATHERED | {"row_of": ROW_OF[:2]}, r"row_of has shape \(2, 2\); expected \(3, top_k\)"),
        (GATHERED | {"row_of": ROW_OF[:, :1]}, "one entry for each of token_of's 6 rows"),
        (GATHERED | {"row_of": changed(ROW_OF, (1, 1), 6)}, r"row_of\[1, 1\] is 6; accepted: 0 to 5"),
        (GATHERED | {"row_of": changed(ROW_OF, (1, 1), -1)}, r"row_of\[1, 1\] is -1; accepted: 0 to 5"),
        (GATHERED | {"row_of": changed(ROW_OF, (1, 1), 2)}, r"row_of\[1, 1\] is 2, which an earlier assignment holds"),
        (
            GATHERED | {"token_of": changed(TOKEN_OF, 4, 2)},
            r"token_of\[4\] is 2, but row_of says that row 4 is token 1's",
        ),
        (GATHERED | {"offsets": offsets_of(0, 3, 5)}, "offsets ends with 5, but token_of has 6 rows"),
    ],
)
def test_gathered_rows_are_refused(op, arguments, message):
    arguments = {"offsets": offsets_of(0, 3, 6), **arguments}
    with pytest.raises(RuntimeError, match=message):
        op(X, GATE_UP, **arguments)


def test_grouped_glu_refuses():
    with pytest.raises(RuntimeError, match="activation is 'relu'; accepted: 'swiglu', 'geglu'"):
        ops.grouped_glu(X, GATE_UP, offsets_of(0, 1, 3), activation="relu")
    with pytest.raises(
        RuntimeError, match=r"gate_up has shape \(3, 5, 4\); its second dimension holds the gate's rows"
    ):
        ops.grouped_glu(X, WEIGHT, offsets_of(0, 1, 2, 3))


def test_gathering_is_a_copy_less():
    """The results of rows that were copied into order first, gradients included."""
    results = []
    for gather in (False, True):
        x, gate_up = X.clone().requires_grad_(), GATE_UP.clone().requires_grad_()
        offsets = offsets_of(0, 2, 6)
        if gather:
            y = ops.grouped_glu(x, gate_up, offsets, **GATHERED)
        else:
            y = ops.grouped_glu(x[TOKEN_OF.long()], gate_up, offsets)
        y.square().sum().backward()
        results.append((y, x.grad, gate_up.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_grouped_glu_forms_again_what_was_not_kept():
    gradients = []
    for keep in (True, False):
        x, gate_up = X.clone().requires_grad_(), GATE_UP.clone().requires_grad_()
        out, kept = torch.ops.llmcore.grouped_glu(x, gate_up, offsets_of(0, 1, 3), None, None, "geglu", keep)
        assert kept.shape == ((3, 6) if keep else (0,))
        gradients.append(torch.autograd.grad(out.sum(), (x, gate_up)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_grouped_glu_keeps_nothing_without_a_gradient():
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func._schema.name, args))
            return func(*args, **(kwargs or {}))

    x, offsets = X.clone().requires_grad_(), offsets_of(0, 1, 3)
    with Record():
        ops.grouped_glu(X, GATE_UP, offsets)
        ops.grouped_glu(x, GATE_UP, offsets)
        with torch.no_grad():
            ops.grouped_glu(x, GATE_UP, offsets)
    assert [args[-1] for name, args in calls if name == "llmcore::grouped_glu"] == [False, True, False]
