"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check_shape


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Weights are as long as x's last dimension, a residual has x's shape: nothing may broadcast."""
    for name, t in vectors.items():
        if t is not None:
            check_shape(f"{op}: {name}", t, *(x.shape if name == "residual" else x.shape[-1:]))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `llmcore.ops.rms_norm`."""
    _check("rms_norm", x, weight=weight, residual=residual)
    z = x if residual is None else x + residual
    wide = z.to(_compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, z)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `llmcore.ops.layer_norm`."""
    _check("layer_norm", x, weight=weight, bias=bias, residual=residual)
    z = x if residual is None else x + residual
    wide = z.to(_compute_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, z)


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `llmcore.ops.dyt`."""
    _check("dyt", x, weight=weight, bias=bias)
    wide = _compute_dtype(x)
    y = torch.tanh(alpha.to(wide).reshape(()) * x.to(wide)) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
