"""Dynamic tanh, the element-wise layer that stands in for normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = tanh(alpha * x) * weight + bias, weight and bias over the last dimension.

    Zhu et al., "Transformers without Normalization" (arXiv 2503.10622).

    Args:
        x: (..., dim), float32, bfloat16 or float16 (float64 through the reference).
        alpha: one element, of any shape; x's dtype.
        weight: (dim,), x's dtype.
        bias: (dim,), x's dtype, or None.

    Returns:
        y, shaped and typed as x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit x's.
    """
    if not use_kernel("dyt", x):
        return reference.dyt(x, alpha, weight, bias)
    return torch.ops.llmcore.dyt(x, alpha, weight, bias)


@register_fake("dyt")
def _(x, alpha, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("dyt_backward")
def _(dy, x, alpha, weight, has_bias):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dalpha, dweight = alpha.new_empty(alpha.shape), weight.new_empty(weight.shape)
    return dx, dalpha, dweight, weight.new_empty(weight.shape if has_bias else 0)


def _save(ctx, inputs, output):
    x, alpha, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, alpha, weight)


def _backward(ctx, dy):
    x, alpha, weight = ctx.saved_tensors
    dx, dalpha, dweight, dbias = torch.ops.llmcore.dyt_backward(dy, x, alpha, weight, ctx.has_bias)
    return dx, dalpha, dweight, (dbias if ctx.has_bias else None)


torch.library.register_autograd("llmcore::dyt", _backward, setup_context=_save)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def alpha(value: float) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    for shape in ((3, 5), (1, 1), (2, 7, 64), (33, 111), (4, 1000), (5, 59)):
        dim = shape[-1]
        yield Sample(
            f"{shape}", (randn(*shape), alpha(0.5), randn(dim), randn(dim)), differentiable=(0, 1, 2, 3)
        )  # fmt: skip
    yield Sample("no bias", (randn(6, 96), alpha(-1.25), randn(96)), differentiable=(0, 1, 2))
    yield Sample("scalar alpha", (randn(6, 97), alpha(0.8)[0], randn(97), randn(97)), differentiable=(0, 1, 2, 3))
    yield Sample(
        "strided rows", (randn(4, 3, 200)[:, :, 7:107], alpha(0.5), randn(100), randn(100)),
        differentiable=(0, 1, 2, 3),
    )  # fmt: skip
    yield Sample("transposed", (randn(64, 5).t(), alpha(0.5), randn(64), randn(64)), differentiable=(0, 1, 2, 3))
    yield Sample("no rows", (randn(0, 16), alpha(0.5), randn(16), randn(16)), differentiable=(0, 1, 2, 3))
    yield Sample("saturated", (randn(3, 70) * 100, alpha(2.0), randn(70), randn(70)), differentiable=(0, 1, 2, 3))
    yield Sample("many rows", (randn(3000, 7) + 1, alpha(0.5), randn(7), randn(7)), differentiable=(0, 1, 2, 3))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    x = torch.randn(4096, 2048).to(device, dtype)
    weight = torch.ones(2048).to(x)
    yield Sample(
        "4096x2048", (x, torch.tensor([0.5]).to(x), weight, torch.zeros_like(weight)), differentiable=(0, 1, 2, 3)
    )


def _peer(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.tanh(alpha * x) * weight
    return y if bias is None else y + bias


register(
    OpSpec(
        name="dyt",
        op=dyt,
        reference=reference.dyt,
        torch_ops=("dyt", "dyt_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("optional bias", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: 2 * s.args[0].numel() * s.args[0].element_size(),
    )
)
