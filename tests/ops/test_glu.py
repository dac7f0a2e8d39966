"""What the registry's checks do not say of the gated linear units: erf's stated accuracy, extremes, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import llmcore
from llmcore.ops import geglu, swiglu


def test_erf_error_is_as_stated(isa):
    """gelu(x sqrt(2)) = x / sqrt(2) * (1 + erf(x)), so the kernel's erf can be read back from it where x > 0."""
    x = torch.linspace(0, 6, 600_001)[1:]
    gate = x * math.sqrt(2)
    value = geglu(gate, torch.ones_like(gate), "none").double()
    z = gate.double()
    exact = z / 2 * (1 + torch.erf(z * math.sqrt(0.5)))
    # half of erf's 1.6e-7, and the roundings of the expression around it
    assert ((value - exact) / z).abs().max() < 0.8e-7 + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("op", [swiglu, lambda g, u: geglu(g, u, "tanh"), lambda g, u: geglu(g, u, "none")])
def test_extremes(op, isa):
    """Far out the activation is the identity or 0, with slope 1 or 0: no overflow on the way."""
    gate = torch.tensor([-3e38, -1e10, -200.0, 0.0, 200.0, 1e10, 3e38, math.inf, math.nan], requires_grad=True)
    y = op(gate, torch.ones(9))
    assert y[:4].abs().max() == 0
    assert torch.equal(y[4:8], gate[4:8])
    assert torch.isnan(y[8])
    y[:7].sum().backward()
    slope = gate.grad[:7]
    assert torch.equal(slope, torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1]))


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_bad_input(op):
    gate = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match=r"up has shape \(3, 7\), but gate has \(3, 8\)"):
        op(gate, torch.randn(3, 7))
    with pytest.raises(RuntimeError, match="up has dtype float64, but gate has float32"):
        op(gate, torch.randn(3, 8).double())
    with pytest.raises(RuntimeError, match="expected a tensor of at least one dimension"):
        op(torch.tensor(1.0), torch.tensor(1.0))
    with llmcore.backend("kernel"), pytest.raises(TypeError, match="dtype int64; accepted: float32"):
        op(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    backward = getattr(torch.ops.llmcore, f"{op.__name__}_backward")
    extra = ("tanh",) if op is geglu else ()
    with pytest.raises(RuntimeError, match=r"dy has shape \(3, 1\), but gate has \(3, 8\)"):
        backward(torch.randn(3, 1), gate, gate, *extra)
    with pytest.raises(RuntimeError, match=r"up has shape \(1, 8\), but gate has \(3, 8\)"):
        backward(gate, gate, torch.randn(1, 8), *extra)


def test_geglu_names_an_unknown_form():
    with pytest.raises(RuntimeError, match="approximate is 'erf'; accepted: 'tanh', 'none'"):
        geglu(torch.randn(2), torch.randn(2), "erf")
