"""Mixture-of-experts routing, permutation and expert-wise products."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_indices, check_offsets, check_shape
from llmcore.reference.glu import geglu, swiglu
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `llmcore.ops.moe_route`; here a plain tuple."""
    tokens, num_experts = logits.shape
    check(
        num_groups >= 1 and num_experts % num_groups == 0 and 1 <= topk_groups <= num_groups
        and 1 <= top_k <= num_experts // num_groups * topk_groups,
        f"moe_route: top_k is {top_k}, num_groups {num_groups} and topk_groups {topk_groups}, for {num_experts} experts"
        "; num_groups must divide them and the chosen groups must hold top_k",
    )  # fmt: skip
    if bias is not None:
        check_shape("moe_route: bias", bias, num_experts)
        check(bool(bias.isfinite().all()), f"moe_route: bias is {bias.tolist()}; it must be finite")
    wide = logits.to(_compute_dtype(logits))
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    if torch.isnan(scores).any():
        raise RuntimeError(f"moe_route: the logits of token {int(scores.isnan().any(-1).nonzero()[0])} hold NaN")
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
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
    return weights * scale, experts.int(), scores, *moe_sort(experts.int(), num_experts)


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `llmcore.ops.moe_sort`."""
    return _sort("moe_sort", experts, num_experts)


def _sort(op: str, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_indices(f"{op}: experts", experts, 0, num_experts)
    flat = experts.flatten().long()
    order = flat.sort(stable=True).indices  # sorted row -> assignment
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    row_of = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=flat.device))
    return offsets, row_of.view(experts.shape).int(), (order // max(experts.shape[1], 1)).int()


def moe_dispatch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `llmcore.ops.moe_dispatch`."""
    check_shape("moe_dispatch: x", x, experts.shape[0], x.shape[-1])
    offsets, row_of, token_of = _sort("moe_dispatch", experts, num_experts)
    x_sorted = x.to(_compute_dtype(x))[token_of].to(x.dtype)  # wide, for the sum in the gradient
    return x_sorted, offsets, row_of


def moe_combine(y_sorted: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    """See `llmcore.ops.moe_combine`."""
    rows = row_of.numel()
    check_shape("moe_combine: weights", weights, *row_of.shape)
    check_shape("moe_combine: y_sorted", y_sorted, rows, y_sorted.shape[-1])
    check_indices("moe_combine: row_of", row_of, 0, rows)
    check(row_of.unique().numel() == rows, "moe_combine: row_of holds a row twice; it must be a permutation")
    wide = y_sorted.to(_compute_dtype(y_sorted))[row_of.long()]  # (tokens, top_k, dim)
    return (wide * weights.to(wide.dtype).unsqueeze(-1)).sum(1).to(y_sorted.dtype)


def _products(op: str, x: Tensor, weight: Tensor, offsets: Tensor, token_of: Tensor | None, row_of: Tensor | None):
    """(rows, n): one product per expert, not rounded to x's dtype yet."""
    dtype = _compute_dtype(x)
    check((token_of is None) == (row_of is None), f"{op}: token_of and row_of go together; give both or neither")
    x = x.to(dtype)
    if token_of is not None:
        tokens, rows = x.shape[0], token_of.numel()
        check_shape(f"{op}: token_of", token_of, rows)
        check_shape(f"{op}: row_of", row_of, tokens, rows // tokens if tokens else row_of.shape[-1])
        check_indices(f"{op}: row_of", row_of, 0, rows)
        held = torch.full_like(token_of, -1)
        held[row_of.long()] = torch.arange(tokens, dtype=held.dtype, device=held.device).unsqueeze(1)
        check(torch.equal(held, token_of), f"{op}: token_of and row_of do not agree on whose the rows are")
        x = x[token_of.long()]
    check_offsets(f"{op}: offsets", offsets, weight.shape[0], x.shape[0])
    groups = x.split(offsets.diff().tolist())
    return torch.cat([x @ w.to(dtype).t() for x, w in zip(groups, weight)])


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, token_of: Tensor | None = None, row_of: Tensor | None = None
) -> Tensor:
    """See `llmcore.ops.grouped_gemm`."""
    return _products("grouped_gemm", x, weight, offsets, token_of, row_of).to(x.dtype)


def grouped_glu(
    x: Tensor,
    gate_up: Tensor,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    row_of: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """See `llmcore.ops.grouped_glu`."""
    check(activation in ("swiglu", "geglu"), f"grouped_glu: activation is {activation!r}; accepted: 'swiglu', 'geglu'")
    check(
        gate_up.shape[1] % 2 == 0, f"grouped_glu: gate_up has shape {tuple(gate_up.shape)}; its second dimension is odd"
    )
    gate, up = _products("grouped_glu", x, gate_up, offsets, token_of, row_of).chunk(2, -1)
    return (swiglu(gate, up) if activation == "swiglu" else geglu(gate, up)).to(x.dtype)
