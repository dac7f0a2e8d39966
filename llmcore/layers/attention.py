"""Self-attention over full batches, packed documents and a paged key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.linear import Linear
from llmcore.layers.norm import RMSNorm
from llmcore.layers.rope import RotaryEmbedding


@dataclass(frozen=True)
class CacheStep:
    """Where the tokens of one forward pass are written in a paged cache, and what they see of it.

    Attributes:
        k_caches, v_caches: per layer, (num_blocks, block_size, num_kv_heads, head_dim).
        slot_mapping: (total,) int64, the slot (block * block_size + offset) of each token's key and value.
        block_table: (batch, max_blocks) int32, the blocks of each sequence in order.
        kv_lens: (batch,) int32, the keys of each sequence, this pass's tokens among them.
        positions: (total,) int64, the position of each token in its sequence.
        cu_seqlens_q: (batch + 1,) int32, where each sequence's tokens begin; None when every sequence has one.
        sequences: the caller's number of each sequence, where it is told.
    """

    k_caches: list[Tensor]
    v_caches: list[Tensor]
    slot_mapping: Tensor
    block_table: Tensor
    kv_lens: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor | None = None
    sequences: tuple[int, ...] | None = None


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values from one fused projection `qkv`.

    Grouped-query attention by `num_kv_heads` (arXiv 2305.13245): `num_heads` gives multi-head attention, 1
    multi-query attention. Rows of `qkv.weight`: the query heads, then the key heads, then the value heads.

    Args:
        dim: features in and out.
        num_heads, num_kv_heads: query heads, and key and value heads; the second divides the first.
        head_dim: features of one head.
        qkv_bias, out_bias: biases of the two projections.
        qk_norm: RMS norm, with norm_eps, on queries and keys before the rotation (arXiv 2302.05442): of each head when
            qk_norm_scope is "head", of all heads as one when it is "all" (OLMo 2, arXiv 2501.00656); norm_unit_offset
            as in `RMSNorm`.
        causal: a token sees no later token.
        window: a token sees the keys less than `window` positions away: itself and `window - 1` before it.
        scale: of the logits, 1 / sqrt(head_dim) when None.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: one learned logit per head that takes part in the softmax and has no value (arXiv 2309.17453).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        qk_norm_scope: str = "head",
        norm_eps: float = 1e-6,
        norm_unit_offset: bool = False,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}; accepted: 1 or more")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; accepted: a divisor of num_heads = {num_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim, self.causal = num_heads, num_kv_heads, head_dim, causal
        self.options = {"window": window, "scale": scale, "softcap": softcap}
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim, bias=out_bias)
        self.qk_norm_scope = qk_norm_scope
        self.q_norm = self.k_norm = None
        if qk_norm:
            sizes = (head_dim, head_dim) if qk_norm_scope == "head" else (num_heads * head_dim, num_kv_heads * head_dim)
            self.q_norm, self.k_norm = (RMSNorm(size, norm_eps, norm_unit_offset) for size in sizes)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    def forward(
        self,
        x: Tensor,
        *,
        rope: RotaryEmbedding | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: CacheStep | None = None,
        layer: int = 0,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """Attends within each row of a batch, within each packed document, or over a cache.

        Args:
            x: (batch, seq, dim); with cu_seqlens or cache, packed (total, dim).
            rope: rotates queries and keys by `positions`, x's shape without dim; without positions, 0, 1, ... along
                seq, which packed tokens can't go without.
            cu_seqlens: (documents + 1,) int32, where each packed document begins; the last entry is total.
            cache: writes the new keys and values of this `layer` into the cache, then attends over it.
            position_bias: (num_heads, odd), added to the scores by distance: see `llmcore.ops.attention`.

        Returns:
            (batch, seq, dim) or (total, dim), as x.
        """
        if rope is not None and positions is None and x.ndim == 2:
            raise ValueError("positions is None; accepted with rope and packed tokens: the position of each, (total,)")
        qkv, entry = self.qkv(x), self._entry(rope, positions, x)
        if self.q_norm is not None and self.qk_norm_scope == "all":
            sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
            q, k, v = qkv.split(sizes, dim=-1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)
        if cache is None:
            if entry:
                q, k, v = ops.qk_norm_rope(qkv, self.num_heads, self.num_kv_heads, **entry)
            else:
                heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
                q, k, v = qkv.unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=-2)
            out = ops.attention(
                q, k, v, causal=self.causal, sinks=self.sinks, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                position_bias=position_bias, **self.options,
            )  # fmt: skip
        else:
            k_cache, v_cache = cache.k_caches[layer], cache.v_caches[layer]
            q = ops.qk_norm_rope_cache_write(
                qkv, self.num_heads, self.num_kv_heads, k_cache, v_cache, cache.slot_mapping, **entry
            )
            out = ops.paged_attention(
                q, k_cache, v_cache, cache.block_table, cache.kv_lens, cu_seqlens_q=cache.cu_seqlens_q,
                causal=self.causal, sinks=self.sinks, position_bias=position_bias, **self.options,
            )  # fmt: skip
        return self.out(out.flatten(-2))

    def _entry(self, rope: RotaryEmbedding | None, positions: Tensor | None, x: Tensor) -> dict:
        """What `ops.qk_norm_rope` takes between the projection and attention."""
        entry = {}
        if self.q_norm is not None and self.qk_norm_scope == "head":
            entry = {"q_weight": self.q_norm.gain, "k_weight": self.k_norm.gain, "eps": self.q_norm.eps}
        if rope is not None:
            if positions is None:
                rope.check_length(x.shape[-2])
            entry |= {"cos": rope.cos, "sin": rope.sin, "positions": positions, "interleaved": rope.interleaved}
        return entry
