"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_shape
from llmcore.reference.norms import _compute_dtype


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """See `llmcore.ops.rope`."""
    check(x.dim() in (3, 4), f"rope: x has shape {tuple(x.shape)}; expected (batch, seq, heads, head_dim) or packed")
    length, half = cos.shape
    check_shape("rope: sin", sin, length, half)
    check(2 * half <= x.shape[-1], f"rope: rotary_dim is {2 * half}; it must not exceed head_dim, {x.shape[-1]}")
    if positions is not None:
        check_shape("rope: positions", positions, *x.shape[:-2])
    else:
        positions = torch.arange(x.shape[-3], device=x.device)
    outside = (positions < 0) | (positions >= length)
    if outside.any():
        token = outside.flatten().nonzero()[0].item()
        position = positions.flatten()[token].item()
        raise RuntimeError(f"rope: position {position} (token {token}) is outside the cos/sin table of length {length}")
    dtype = _compute_dtype(x)
    c, s = (t[positions.long()].unsqueeze(-2).to(dtype) for t in (cos, sin))  # (..., seq, 1, half)
    rotated, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)
    else:
        first, second = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat((first * c - second * s, second * c + first * s), -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """See `llmcore.ops.rope_`."""
    return x.copy_(rope(x, cos, sin, positions, interleaved=interleaved))
