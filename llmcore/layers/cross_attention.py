"""Attention of a decoder to what an encoder made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.linear import Linear


@dataclass(frozen=True)
class Memory:
    """What the layers of a decoder see of an encoder's output.

    Attributes:
        keys_values: per layer, the keys and the values: (batch, seq, num_kv_heads, head_dim), or packed (total, ...).
        cu_seqlens: (sequences + 1,) int32, where the keys of each packed sequence begin; None when they are not packed.
        cu_seqlens_q: the same of the decoder's tokens, some of whose sequences may have none.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    cu_seqlens: Tensor | None = None
    cu_seqlens_q: Tensor | None = None


class CrossAttention(nn.Module):
    """Multi-head attention whose queries come from one sequence and whose keys and values from another
    (arXiv 1706.03762, section 3.2.3). Rows of `kv.weight`: the key heads, then the value heads.

    Args:
        dim: features in and out, of both sequences.
        num_heads, num_kv_heads, head_dim, scale: as in `Attention`.
        bias, out_bias: of the projections of queries, keys and values, and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.scale = num_heads, num_kv_heads, scale
        self.q = Linear(dim, num_heads * head_dim, bias=bias)
        self.kv = Linear(dim, 2 * num_kv_heads * head_dim, bias=bias)
        self.out = Linear(num_heads * head_dim, dim, bias=out_bias)

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of an encoder's hidden states (..., dim): (..., num_kv_heads, head_dim) each."""
        k, v = self.kv(hidden).unflatten(-1, (2 * self.num_kv_heads, -1)).chunk(2, dim=-2)
        return k, v

    def forward(self, x: Tensor, memory: Memory, layer: int = 0) -> Tensor:
        """x: (batch, seq, dim), or packed (total, dim) with a packed memory. Gives x's shape."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k, v = memory.keys_values[layer]
        if (memory.cu_seqlens is None) != (x.ndim == 3):
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: packed with a packed memory, else rows")
        out = ops.attention(q, k, v, scale=self.scale, cu_seqlens_q=memory.cu_seqlens_q, cu_seqlens_k=memory.cu_seqlens)
        return self.out(out.flatten(-2))
