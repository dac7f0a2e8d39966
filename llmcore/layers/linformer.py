"""Attention of linear cost by a low-rank projection along the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcore import ops


class LinformerAttention(nn.Module):
    """Non-causal self-attention whose keys and values are projected along the sequence to `k_proj` rows each
    (Linformer, arXiv 2006.04768), so that the cost grows with seq * k_proj instead of seq^2.

    The projections `key_proj` and `value_proj`, (k_proj, max_positions), are shared by the heads. A shorter sequence
    uses their first columns. Every projected row mixes the whole sequence, so there is no causal form.

    Args:
        dim: features in and out.
        num_heads: heads of dim / num_heads features each.
        max_positions: longest sequence.
        k_proj: rows that keys and values are projected to.
        bias: of `qkv` and `out`.
    """

    def __init__(self, dim: int, num_heads: int, max_positions: int, k_proj: int, bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; accepted: a divisor of dim = {dim}")
        if not 1 <= k_proj <= max_positions:
            raise ValueError(f"k_proj is {k_proj}; accepted: 1 to max_positions = {max_positions}")
        self.num_heads, self.max_positions = num_heads, max_positions
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.key_proj = nn.Parameter(torch.randn(k_proj, max_positions) / k_proj**0.5)
        self.value_proj = nn.Parameter(torch.randn(k_proj, max_positions) / k_proj**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, dim), seq at most max_positions. Gives (batch, seq, dim)."""
        seq = x.shape[1]
        if seq > self.max_positions:
            raise ValueError(f"seq is {seq}; accepted: at most max_positions = {self.max_positions}")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = self.key_proj[:, :seq] @ k, self.value_proj[:, :seq] @ v
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return self.out(ops.attention(q, k, v).flatten(-2))
