"""Losses over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.norms import _compute_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """See `llmcore.ops.linear_cross_entropy`."""
    dtype = _compute_dtype(hidden)
    valid = targets != ignore_index
    logits = hidden[valid].to(dtype) @ weight.to(dtype).t()  # ignored tokens are not even read
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, targets[valid].unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * target + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    if reduction == "none":
        return torch.zeros(targets.shape, dtype=dtype, device=hidden.device).masked_scatter(valid, loss)
    return loss.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)
