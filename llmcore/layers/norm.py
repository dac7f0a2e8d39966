"""Normalisation layers, each with an optional fused residual addition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcore import ops

NORMS = ("rms", "layer", "dyt")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), with a learned gain of shape (dim,).

    With `unit_offset`, `weight` holds the gain's distance from 1 (Gemma, arXiv 2403.08295).
    """

    def __init__(self, dim: int, eps: float = 1e-6, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.zeros(dim) if unit_offset else torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., dim). Gives norm(x); with a residual, the pair (norm(x + residual), x + residual)."""
        return ops.rms_norm(x, self.gain, self.eps, residual)

    @property
    def gain(self) -> Tensor:
        """(dim,), what the normalised features are multiplied by."""
        return self.weight + 1 if self.unit_offset else self.weight


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450) over the last dimension, with a learned gain and, with `bias`, a shift."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., dim). Gives norm(x); with a residual, the pair (norm(x + residual), x + residual)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual)


class DyT(nn.Module):
    """Dynamic tanh, tanh(alpha * x) * weight + bias: stands where a norm would ("Transformers without
    Normalization", arXiv 2503.10622). alpha is one learned scalar, weight and bias are (dim,)."""

    def __init__(self, dim: int, init_alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), init_alpha))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., dim). Gives DyT(x); with a residual, the pair (DyT(x + residual), x + residual)."""
        if residual is None:
            return ops.dyt(x, self.alpha, self.weight, self.bias)
        z = x + residual
        return ops.dyt(z, self.alpha, self.weight, self.bias), z


def make_norm(kind: str, dim: int, eps: float = 1e-6, bias: bool = True, unit_offset: bool = False) -> nn.Module:
    """The norm of `kind` ("rms", "layer" or "dyt") over `dim` features. `bias` matters to "layer" only, `unit_offset`
    to "rms" only; "dyt" has no eps and always a bias."""
    if kind == "rms":
        return RMSNorm(dim, eps, unit_offset)
    if kind == "layer":
        return LayerNorm(dim, eps, bias)
    if kind == "dyt":
        return DyT(dim)
    raise ValueError(f"norm is {kind!r}; accepted: {', '.join(map(repr, NORMS))}")
