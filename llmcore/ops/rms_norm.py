"""RMS normalisation with an optional fused residual addition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = z / sqrt(mean(z^2) + eps) * weight over the last dimension, with z = x + residual when one is given.

    Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467). Statistics are in float32.

    Args:
        x: (..., dim), float32, bfloat16 or float16 (float64 through the reference); dim >= 1.
        weight: (dim,), x's dtype.
        eps: added to the mean square; not negative.
        residual: (..., dim), x's shape and dtype: the residual stream to add first.

    Returns:
        y, shaped and typed as x; with `residual`, the pair (y, z).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit x's, or a negative eps.
    """
    if not use_kernel("rms_norm", x):
        return reference.rms_norm(x, weight, eps, residual)
    y, z, _ = torch.ops.llmcore.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, z)


@register_fake("rms_norm")
def _(x, weight, residual, eps):
    z = torch.empty_like(x, memory_format=torch.contiguous_format) if residual is not None else x.new_empty(0)
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), z, x.new_empty(rows, dtype=torch.float32)


@register_fake("rms_norm_backward")
def _(dy, dz, z, weight, rstd):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, residual, eps = inputs
    _, z, rstd = output
    ctx.recompute = lambda ctx: torch.ops.llmcore.rms_norm(*ctx.saved_tensors[:2], None, eps)[0]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(z if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dz, _):
    z, weight, rstd = ctx.saved_tensors
    if dy is None:  # only the residual stream was used
        return dz, None, dz, None
    dx, dweight = torch.ops.llmcore.rms_norm_backward(dy, dz if ctx.has_residual else None, z, weight, rstd)
    return dx, dweight, (dx if ctx.has_residual else None), None


torch.library.register_autograd("llmcore::rms_norm", _backward, setup_context=_save)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    for shape in ((1, 1), (3, 5), (2, 7, 64), (33, 111), (4, 1000)):
        yield Sample(f"{shape}", (randn(*shape), randn(shape[-1])), differentiable=(0, 1))
    x, weight = randn(6, 96), randn(96)
    yield Sample("residual", (x, weight, 1e-5, randn(6, 96)), differentiable=(0, 1, 3))
    yield Sample("strided rows", (randn(4, 3, 200)[:, :, 7:107], randn(100)), differentiable=(0, 1))
    yield Sample("transposed", (randn(64, 5).t(), randn(64)), differentiable=(0, 1))
    yield Sample("no rows", (randn(0, 16), randn(16)), differentiable=(0, 1))
    yield Sample("large values", (randn(3, 70) * 1e3, randn(70)), differentiable=(0, 1))
    yield Sample("many rows", (randn(3000, 7) + 1, randn(7)), differentiable=(0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    x = torch.randn(4096, 2048).to(device, dtype)
    yield Sample("4096x2048", (x, torch.ones(2048).to(x)), differentiable=(0, 1))


def _peer(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    z = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(z, weight.shape, weight, eps)
    return y if residual is None else (y, z)


register(
    OpSpec(
        name="rms_norm",
        op=rms_norm,
        reference=reference.rms_norm,
        torch_ops=("rms_norm", "rms_norm_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("fused residual add", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        bytes=lambda s: 2 * s.args[0].numel() * s.args[0].element_size(),
    )
)
