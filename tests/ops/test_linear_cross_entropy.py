"""linear_cross_entropy: bad input, agreement with torch's own loss, gradients by either path, bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import llmcore
from llmcore import ops
from llmcore.ops import Sample, linear_cross_entropy_cuda
from llmcore.ops.registry import FLOATS
from tests.simt.emulation import composed_as_on_cuda

from .checks import check_sample
from .test_registry import ISAS

HIDDEN, WEIGHT, TARGETS = torch.ones(6, 4), torch.ones(9, 4), torch.arange(6)


BAD_TARGETS = [
    ({"targets": torch.tensor([0, 1, 2, 9, 4, 5])}, r"targets\[3\] is 9; accepted: 0 to 8, or -100 to ignore"),
    ({"targets": torch.tensor([0, -1, 2, 3, 4, 5])}, r"targets\[1\] is -1; accepted: 0 to 8"),
    ({"targets": torch.tensor([-100, 1, 2, 3, 4, 5]), "ignore_index": -1}, r"targets\[0\] is -100"),
]
BAD_CALLS = [
    ({"targets": TARGETS.int()}, "targets has dtype int32; expected int64"),
    ({"targets": TARGETS[:5]}, r"targets has shape \(5,\), but hidden has \(6, 4\)"),
    ({"targets": TARGETS.view(2, 3)}, r"targets has shape \(2, 3\), but hidden has \(6, 4\)"),
    ({"weight": WEIGHT[:, :3]}, r"weight has shape \(9, 3\); expected \(vocab, 4\)"),
    ({"weight": WEIGHT[:0]}, r"weight has shape \(0, 4\)"),
    ({"weight": WEIGHT.bfloat16()}, "weight has dtype bfloat16, but hidden has float32"),
    ({"hidden": HIDDEN[:, :0]}, r"hidden has shape \(6, 0\)"),
    ({"softcap": 0.0}, "softcap is 0.0; it must be positive, or None"),
    ({"softcap": -2.0}, "softcap is -2.0"),
    ({"softcap": math.nan}, "softcap is nan"),
    ({"softcap": 1e39}, r"softcap is 1e\+39; accepted: 1e-30 to 1e30"),
    ({"softcap": 1e-50}, "softcap is 1e-50; accepted: 1e-30 to 1e30"),
    ({"z_loss": math.inf}, "z_loss is inf; it must be finite"),
    ({"label_smoothing": 1.5}, "label_smoothing is 1.5; accepted: 0 to 1"),
    ({"label_smoothing": math.nan}, "label_smoothing is nan"),
    ({"reduction": "max"}, "reduction is 'max'; accepted: 'mean', 'sum', 'none'"),
]


def call_with(arguments: dict, gradient: bool):
    call = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **arguments}
    call["hidden"] = call["hidden"].clone().requires_grad_(gradient)
    return ops.linear_cross_entropy(**call)


@pytest.mark.parametrize(("arguments", "message"), BAD_TARGETS + BAD_CALLS)
@pytest.mark.parametrize("gradient", [False, True])
def test_refuses(arguments, message, gradient):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call_with(arguments, gradient)


def example(tokens: int = 50, dim: int = 24, vocab: int = 400):
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, dim, generator=make), torch.randn(vocab, dim, generator=make)
    targets = torch.randint(vocab, (tokens,), generator=make)
    targets[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_agrees_with_torch(reduction, label_smoothing):
    hidden, weight, targets = example()
    ours = ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=label_smoothing)
    theirs = cross_entropy(linear(hidden, weight), targets, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, theirs)
    ours_grad = torch.autograd.grad(ours.sum(), (hidden, weight))
    torch.testing.assert_close(ours_grad, torch.autograd.grad(theirs.sum(), (hidden, weight)))


def test_both_paths_give_the_same_loss_and_gradients():
    """A reduced loss has its gradients from the forward pass; the sum of single losses computes them afterwards."""
    hidden, weight, targets = example(tokens=1500)
    losses = ops.linear_cross_entropy(hidden, weight, targets, reduction="none")
    reduced = ops.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    with torch.no_grad():
        assert torch.equal(reduced, ops.linear_cross_entropy(hidden, weight, targets, reduction="sum"))
    assert torch.equal(reduced, losses.sum())
    for a, b in zip(
        torch.autograd.grad(3 * losses.sum(), (hidden, weight)), torch.autograd.grad(3 * reduced, (hidden, weight))
    ):
        torch.testing.assert_close(a, b)


def test_a_graph_can_be_gone_through_twice():
    """The gradients lie in the graph: going through it must leave them as they are where it is kept."""
    for factor in (1.0, 0.25):
        hidden, weight, targets = example()
        loss = factor * ops.linear_cross_entropy(hidden, weight, targets)
        loss.backward(retain_graph=True)
        once = hidden.grad.clone(), weight.grad.clone()
        loss.backward()
        for leaf, gradient in zip((hidden, weight), once):
            torch.testing.assert_close(leaf.grad, 2 * gradient)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_chunks_of_a_large_vocabulary(dtype):
    """Small vocabularies have smaller chunks; the sum over chunks is kept in three bytes where it is of bf16."""
    spec = ops.registry["linear_cross_entropy"]
    hidden, weight, targets = (t.detach() for t in example(tokens=2100, dim=20, vocab=16_500))
    check_sample(spec, Sample("chunks", (hidden.to(dtype), (weight / 4).to(dtype), targets), {}, (0, 1)))


def test_only_the_gradient_that_is_needed():
    hidden, weight, targets = example()
    for reduction in ("mean", "none"):
        ops.linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is None
        hidden.grad = None


def test_float16_gradients_survive_a_loss_scale():
    """Unscaled, these gradients are below the smallest float16; the scale must reach them before they are rounded."""
    hidden, weight, targets = (t.detach() for t in example(tokens=4000, dim=8, vocab=300))
    hidden, weight = (hidden * 1e-3).half().requires_grad_(), weight.half().requires_grad_()
    (ops.linear_cross_entropy(hidden, weight, targets) * 65536).backward()
    exact = cross_entropy(linear(hidden.double(), weight.double()), targets) * 65536
    for leaf, grad in zip((hidden, weight), torch.autograd.grad(exact, (hidden, weight))):
        assert (leaf.grad - grad).abs().max() <= 2e-3 * grad.abs().max()


def test_second_derivatives_are_refused_not_wrong():
    hidden, weight, targets = example()
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.fixture(params=ISAS)
def isa(request):
    before = llmcore._C.active_cpu_isa()
    assert llmcore._C.set_cpu_isa(request.param)
    yield request.param
    llmcore._C.set_cpu_isa(before)


def test_sums_over_chunks_lose_nothing(isa):
    """Not even a bf16 sum of 20 chunks is off by more than two roundings of the exact one (upper halves alone: 18)."""
    hidden, weight, targets = (t.detach() for t in example(tokens=5000, dim=16, vocab=600))
    hidden, weight = hidden.bfloat16(), (weight / 4).bfloat16().requires_grad_()
    ops.linear_cross_entropy(hidden, weight, targets).backward()
    exact = weight.detach().double().requires_grad_()
    cross_entropy(linear(hidden.double(), exact), targets).backward()

    def error(t: torch.Tensor) -> float:
        return float((t.double() - exact.grad).norm())

    assert error(weight.grad) < 2 * error(exact.grad.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cuda_side_on_the_cpu_s_kernel(dtype, isa, monkeypatch):
    """Its chunks and products, with the CPU twin of its kernel (tests/simt runs the CUDA kernel itself)."""
    monkeypatch.setattr(linear_cross_entropy_cuda, "CHUNK_BYTES", 0)
    monkeypatch.setattr(linear_cross_entropy_cuda, "MIN_CHUNK", 13)
    with composed_as_on_cuda(), llmcore.backend("kernel"):
        for sample in ops.registry["linear_cross_entropy"].samples(dtype, "cpu"):
            check_sample(ops.registry["linear_cross_entropy"], sample)
        hidden, weight, targets = example()
        targets[3] = 400
        losses = ops.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[3]]
    ops.check_device_errors("cpu")  # only kernels on a CUDA device record errors
