"""recompute_activations: the same gradients to the last bit, and the outputs really are let go."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import linear

from llmcore import ops

OPS = {
    "rms_norm": lambda x, gain: ops.rms_norm(x, gain),
    "rms_norm + residual": lambda x, gain: ops.rms_norm(x, gain, residual=x.flip(0))[0],
    "swiglu": lambda x, gain: ops.swiglu(x, x.roll(1, -1)),
    "geglu": lambda x, gain: ops.geglu(x, x.roll(1, -1), "none"),
}


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((12, 40), (40,), (24, 40), (7, 40))
    return [torch.randn(shape, generator=make).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_equal_and_the_output_is_let_go(name, dtype):
    def run(context) -> tuple[bool, list[torch.Tensor]]:
        x, gain, *weights = leaves(dtype)
        with context:
            out = OPS[name](x, gain)
            gone = weakref.ref(out.untyped_storage())
            total = sum(linear(out, weight).square().sum() for weight in weights)  # two ops ask for the same output
            del out
        let_go = gone() is None
        gradients = torch.autograd.grad(total, [x, gain, *weights], allow_unused=True)
        return let_go, [g for g in gradients if g is not None]

    (usual, expected), (let_go, gradients) = run(torch.enable_grad()), run(ops.recompute_activations())
    assert (usual, let_go) == (False, True)
    assert len(gradients) == len(expected) >= 3
    for a, b in zip(gradients, expected):
        assert torch.equal(a, b)


def test_the_residual_stream_itself_is_kept():
    """The second output of a norm is what its backward pass reads: it must not be traded for the first."""
    x, gain, weight, _ = leaves(torch.float32)
    results = []
    for context in (torch.enable_grad(), ops.recompute_activations()):
        with context:
            y, z = ops.rms_norm(x, gain, residual=x.flip(0))
            total = (linear(y, weight).sum() + (z * z).sum()) + y.square().sum()
        results.append(torch.autograd.grad(total, [x, gain, weight]))
    for a, b in zip(*results):
        assert torch.equal(a, b)
