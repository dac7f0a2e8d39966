"""Positions that are not rotations: waves added to the embeddings, and a bias on the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """sin(p / 10000^(2i / dim)) in feature 2i and its cosine in 2i + 1 (arXiv 1706.03762, section 3.5).

    positions: (...), integers. Gives (..., dim), formed in float32.
    """
    pair = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(pair * (-math.log(10000.0) / dim))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim].to(dtype)


class RelativeBias(nn.Module):
    """A learned bias on the scores for each head and bucket of distances (T5, arXiv 1910.10683, section 2.1).

    Near distances have a bucket each; farther ones share buckets that widen with the logarithm of the distance, up to
    `max_distance`, from which on all are one. `weight` is (num_buckets, num_heads).

    Args:
        bidirectional: keys before and after the query have half of the buckets each; else those after share bucket 0
            with the query's own place.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def buckets(self) -> Tensor:
        """(2 * max_distance + 1,): the bucket of a key that lies -max_distance to max_distance after the query."""
        offset = torch.arange(-self.max_distance, self.max_distance + 1, device=self.weight.device)
        count, first = len(self.weight), torch.zeros_like(offset)
        if self.bidirectional:
            count //= 2
            first = (offset > 0) * count
            distance = offset.abs()
        else:
            distance = (-offset).clamp(min=0)
        exact = count // 2
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)

    def forward(self) -> Tensor:
        """The `position_bias` of `llmcore.ops.attention`: (num_heads, 2 * max_distance + 1)."""
        return self.weight[self.buckets()].mT
