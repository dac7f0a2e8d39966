"""Gated linear units."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu

from llmcore.reference.checks import check_shape
from llmcore.reference.norms import _compute_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `llmcore.ops.swiglu`."""
    check_shape("swiglu: up", up, *gate.shape)
    dtype = _compute_dtype(gate)
    return (silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """See `llmcore.ops.geglu`."""
    check_shape("geglu: up", up, *gate.shape)
    dtype = _compute_dtype(gate)
    return (gelu(gate.to(dtype), approximate=approximate) * up.to(dtype)).to(gate.dtype)
