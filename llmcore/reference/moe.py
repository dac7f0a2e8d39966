"""Mixture-of-experts routing, permutation and expert-wise products."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.norms import _compute_dtype


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, best first; of equals, the lower index first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `llmcore.ops.moe_route`."""
    wide = logits.to(_compute_dtype(logits))
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    if torch.isnan(scores).any():
        raise RuntimeError(f"moe_route: the logits of token {int(scores.isnan().any(-1).nonzero()[0])} hold NaN")
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    tokens, num_experts = logits.shape
    if topk_groups < num_groups:
        grouped = choice.view(tokens, num_groups, num_experts // num_groups)
        best = 1 if score == "softmax" and bias is None else min(2, grouped.shape[-1])
        groups = _largest(grouped.sort(dim=-1, descending=True).values[..., :best].sum(-1), topk_groups)
        kept = torch.zeros(tokens, num_groups, dtype=torch.bool, device=logits.device).scatter(1, groups, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(tokens, num_experts)
    experts = _largest(choice, top_k)
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights * scale, experts.int(), scores


def moe_dispatch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `llmcore.ops.moe_dispatch`."""
    tokens, top_k = experts.shape
    flat = experts.flatten().long()
    order = flat.sort(stable=True).indices  # sorted row -> assignment
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device).scatter_add(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    row_of = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    x_sorted = x.to(_compute_dtype(x))[order // top_k].to(x.dtype)  # wide, for the sum in the gradient
    return x_sorted, offsets, row_of.view(tokens, top_k).int()


def moe_combine(y_sorted: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    """See `llmcore.ops.moe_combine`."""
    wide = y_sorted.to(_compute_dtype(y_sorted))[row_of.long()]  # (tokens, top_k, dim)
    return (wide * weights.to(wide.dtype).unsqueeze(-1)).sum(1).to(y_sorted.dtype)


def grouped_gemm(x_sorted: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `llmcore.ops.grouped_gemm`."""
    dtype = _compute_dtype(x_sorted)
    groups = x_sorted.split(offsets.diff().tolist())
    return torch.cat([x.to(dtype) @ w.to(dtype).t() for x, w in zip(groups, weight)]).to(x_sorted.dtype)
