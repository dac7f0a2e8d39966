"""From logits to tokens: pure functions over a batch."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> None:
    """Raises a ValueError that names the first value out of its range."""
    for name, value, good, accepted in (
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or above"),
        ("top_k", top_k, top_k is None or (isinstance(top_k, Integral) and top_k >= 1), "1 or more, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, to 1, or None"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "0 to 1, or None"),
    ):
        if not good:
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


def probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The distribution that tokens are drawn from.

    Filters apply in this order, each to what the one before left, renormalised:

    Args:
        logits: (batch, vocab); -inf marks a token that can't be drawn.
        temperature: divides the logits; 0 puts all probability on the largest one (the first of equals).
        top_k: keeps the k likeliest tokens; of equals the lower ids.
        top_p: keeps the likeliest tokens up to the one that brings their sum to top_p (nucleus sampling, arXiv
            1904.09751).
        min_p: keeps tokens with at least min_p of the likeliest one's probability (arXiv 2407.01082).

    Returns:
        (batch, vocab) float64, each row summing to 1.

    Raises:
        ValueError: for a setting out of its range, or a row of logits that holds NaN or +inf, or -inf only.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    logits = logits.double()
    best = logits.amax(-1, keepdim=True)
    bad = ~torch.isfinite(best.squeeze(-1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"logits of row {row} have the maximum {best[row].item()}; accepted: a finite one")
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # subtracting first keeps a tiny temperature from giving inf - inf
    p = ((logits - best) / temperature).softmax(-1)
    if top_k is not None or top_p is not None:
        ranked, ids = p.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p is not None:
            total = ranked.sum(-1, keepdim=True)
            before = ranked.cumsum(-1) - ranked
            ranked = ranked.masked_fill(before >= top_p * total, 0)
        p = torch.zeros_like(p).scatter_(-1, ids, ranked)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token per row by inverting its distribution function.

    Args:
        probs: (batch, vocab) float64.
        uniform: (batch,) float64 in [0, 1), one random number per row.

    Returns:
        (batch,) int64; a token of probability 0 is never drawn.
    """
    cdf = probs.cumsum(-1)
    # the first token whose cdf is above the target; the target stays below the last value, which rounding may move
    target = torch.minimum(uniform * cdf[:, -1], torch.nextafter(cdf[:, -1], torch.zeros_like(cdf[:, -1])))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)
