"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check_shape


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `llmcore.ops.linear`."""
    n, k = weight.shape
    check_shape("linear: x", x, *x.shape[:-1], k)
    if bias is not None:
        check_shape("linear: bias", bias, n)
    return torch.nn.functional.linear(x, weight, bias)
