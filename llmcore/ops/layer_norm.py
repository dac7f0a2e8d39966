"""Layer normalisation with an optional fused residual addition."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias over the last dimension, with z = x + residual when one
    is given; var is the mean squared deviation.

    Ba, Kiros & Hinton, "Layer Normalization" (arXiv 1607.06450). Statistics are in float32, in two passes.

    Args:
        x: (..., dim), float32, bfloat16 or float16 (float64 through the reference); dim >= 1.
        weight: (dim,), x's dtype.
        bias: (dim,), x's dtype, or None.
        eps: added to the variance; not negative.
        residual: (..., dim), x's shape and dtype: the residual stream to add first.

    Returns:
        y, shaped and typed as x; with `residual`, the pair (y, z).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit x's, or a negative eps.
    """
    if not use_kernel("layer_norm", x):
        return reference.layer_norm(x, weight, bias, eps, residual)
    y, z, _, _ = torch.ops.llmcore.layer_norm(x, weight, bias, residual, eps)
    return y if residual is None else (y, z)


@register_fake("layer_norm")
def _(x, weight, bias, residual, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    z = torch.empty_like(y) if residual is not None else x.new_empty(0)
    mean = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return y, z, mean, torch.empty_like(mean)


@register_fake("layer_norm_backward")
def _(dy, dz, z, weight, mean, rstd, has_bias):
    dx = torch.empty_like(z, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _save(ctx, inputs, output):
    x, weight, bias, residual, _ = inputs
    _, z, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(z if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dz, *_):
    z, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the residual stream was used
        return dz, None, None, dz, None
    dx, dweight, dbias = torch.ops.llmcore.layer_norm_backward(
        dy, dz if ctx.has_residual else None, z, weight, mean, rstd, ctx.has_bias
    )
    return dx, dweight, (dbias if ctx.has_bias else None), (dx if ctx.has_residual else None), None


torch.library.register_autograd("llmcore::layer_norm", _backward, setup_context=_save)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    for shape in ((3, 5), (1, 1), (2, 7, 64), (33, 111), (4, 1000), (5, 59)):
        dim = shape[-1]
        yield Sample(f"{shape}", (randn(*shape), randn(dim), randn(dim)), differentiable=(0, 1, 2))
    yield Sample("no bias", (randn(6, 96), randn(96)), differentiable=(0, 1))
    yield Sample(
        "residual", (randn(6, 97), randn(97), randn(97), 1e-6, randn(6, 97)), differentiable=(0, 1, 2, 4)
    )  # fmt: skip
    yield Sample("residual, no bias", (randn(6, 96), randn(96), None, 1e-5, randn(6, 96)), differentiable=(0, 1, 4))
    yield Sample("strided rows", (randn(4, 3, 200)[:, :, 7:107], randn(100), randn(100)), differentiable=(0, 1, 2))
    yield Sample("transposed", (randn(64, 5).t(), randn(64), randn(64)), differentiable=(0, 1, 2))
    yield Sample("no rows", (randn(0, 16), randn(16), randn(16)), differentiable=(0, 1, 2))
    yield Sample("large mean", (randn(3, 70) + 100, randn(70), randn(70)), differentiable=(0, 1, 2))
    yield Sample("many rows", (randn(3000, 7) + 1, randn(7), randn(7)), differentiable=(0, 1, 2))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    x = torch.randn(4096, 2048).to(device, dtype)
    weight = torch.ones(2048).to(x)
    yield Sample("4096x2048", (x, weight, torch.zeros_like(weight)), differentiable=(0, 1, 2))


def _peer(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    z = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(z, weight.shape, weight, bias, eps)
    return y if residual is None else (y, z)


register(
    OpSpec(
        name="layer_norm",
        op=layer_norm,
        reference=reference.layer_norm,
        torch_ops=("layer_norm", "layer_norm_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("optional bias", "fused residual add", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: 2 * s.args[0].numel() * s.args[0].element_size(),
    )
)
