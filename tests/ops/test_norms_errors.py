"""Bad input to the normalisation layers: an error that names the value, from the public op and the raw torch op."""

from __future__ import annotations

import pytest
import torch

from llmcore.ops import dyt, layer_norm, rms_norm

X, W = torch.randn(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(7)), r"weight has shape \(7,\); expected \(8\)"),
        ((X, torch.ones(1, 8)), r"weight has shape \(1, 8\); expected \(8\)"),
        ((X, W.double()), "weight has dtype float64, but x has float32"),
        ((X, W, torch.ones(9)), r"bias has shape \(9,\); expected \(8\)"),
        ((X, W, W.bfloat16()), "bias has dtype bfloat16, but x has float32"),
        ((X, W, None, -1.0), "eps is -1; it must not be negative"),
        ((X, W, None, 1e-5, torch.randn(4, 8)), r"residual has shape \(4, 8\), but x has \(3, 8\)"),
        ((X, W, None, 1e-5, torch.randn(3, 8).half()), "residual has dtype float16, but x has float32"),
        ((torch.randn(3, 0), torch.ones(0)), r"x has shape \(3, 0\); the last dimension must not be empty"),
        ((torch.tensor(1.0), W), "at least one dimension"),
    ],
)
def test_layer_norm(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        layer_norm(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(7)), r"weight has shape \(7,\); expected \(8\)"),
        ((X, W.double()), "weight has dtype float64, but x has float32"),
        ((X, W, float("nan")), "eps is nan; it must not be negative"),
        ((X, W, 1e-5, torch.randn(1, 8)), r"residual has shape \(1, 8\), but x has \(3, 8\)"),
        ((X, W, 1e-5, torch.randn(3, 8).half()), "residual has dtype float16, but x has float32"),
        ((torch.randn(3, 0), torch.ones(0)), r"x has shape \(3, 0\); the last dimension must not be empty"),
        ((torch.tensor(1.0), W), "at least one dimension"),
    ],
)
def test_rms_norm(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        rms_norm(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.randn(3, 7)}, r"dy has shape \(3, 7\), but z has \(3, 8\)"),
        ({"dz": torch.randn(3, 8).half()}, "dz has dtype float16, but z has float32"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\); expected \(8\)"),
        ({"rstd": torch.ones(2)}, r"rstd has shape \(2,\); expected \(3\)"),
    ],
)
def test_rms_norm_backward(change, message):
    call = {"dy": X, "dz": None, "z": X, "weight": W, "rstd": torch.ones(3)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.rms_norm_backward(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.randn(3, 7)}, r"dy has shape \(3, 7\), but z has \(3, 8\)"),
        ({"dz": torch.randn(2, 8)}, r"dz has shape \(2, 8\), but z has \(3, 8\)"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\); expected \(8\)"),
        ({"mean": torch.ones(2)}, r"mean has shape \(2,\); expected \(3\)"),
        ({"rstd": torch.ones(3).double()}, "rstd has dtype float64; expected float32"),
    ],
)
def test_layer_norm_backward(change, message):
    call = {"dy": X, "dz": None, "z": X, "weight": W, "mean": torch.ones(3), "rstd": torch.ones(3), "has_bias": True}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.layer_norm_backward(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.ones(2)}, r"alpha has shape \(2,\); expected one element"),
        ({"alpha": torch.ones(0)}, r"alpha has shape \(0,\); expected one element"),
        ({"alpha": torch.ones(1).half()}, "alpha has dtype float16, but x has float32"),
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\); expected \(8\)"),
        ({"weight": W.double()}, "weight has dtype float64, but x has float32"),
        ({"bias": torch.ones(2, 8)}, r"bias has shape \(2, 8\); expected \(8\)"),
    ],
)
def test_dyt(change, message):
    call = {"x": X, "alpha": torch.ones(1), "weight": W, "bias": W}
    with pytest.raises(RuntimeError, match=message):
        dyt(**{**call, **change})
    if "bias" in change:
        return
    backward = {"dy": X, **{k: v for k, v in call.items() if k != "bias"}, **change, "has_bias": True}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llmcore.dyt_backward(**backward)


def test_dyt_empty_last_dimension():
    x = torch.randn(3, 0, requires_grad=True)
    alpha = torch.ones(1, requires_grad=True)
    y = dyt(x, alpha, torch.ones(0), torch.ones(0))
    y.sum().backward()
    assert y.shape == x.grad.shape == (3, 0)
    assert alpha.grad.item() == 0


def test_layer_norm_keeps_a_non_finite_row_to_itself():
    x = X.clone()
    x[1, 3] = torch.inf
    y = layer_norm(x, W)
    assert torch.isnan(y[1]).any()
    assert torch.equal(y[[0, 2]], layer_norm(X, W)[[0, 2]])
