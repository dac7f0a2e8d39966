"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.layers.attention import CacheStep
from llmcore.layers.linear import Linear
from llmcore.layers.norm import RMSNorm
from llmcore.layers.rope import RotaryEmbedding

_LATENT_EPS = 1e-6  # of the norms on the latents, whatever the model's own


class LatentAttention(nn.Module):
    """Attention whose keys and values are made from one latent vector per token, beside one rotated key that all heads
    share. The cache holds these two alone: kv_lora_rank + qk_rope_head_dim numbers per token.

    Over a cache the matrices that make keys and values from the latent are absorbed into the queries and the outputs
    (section 2.1.2 of the paper), so that attention runs over the latents as over a single key-value head.

    Args:
        dim: features in and out.
        num_heads: query heads.
        q_lora_rank: width of the queries' latent; None: queries come from one matrix.
        kv_lora_rank: width of the latent.
        qk_nope_head_dim, qk_rope_head_dim: features of a head's query and key without and with rotation.
        v_head_dim: features of a head's value.
        bias: of the matrices into the latents and of the output.
        scale: of the logits; None: 1 / sqrt(qk_nope_head_dim + qk_rope_head_dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_lora_rank, self.v_head_dim = num_heads, kv_lora_rank, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 if scale is None else scale
        q_dim = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.q = Linear(dim, q_dim, bias=False) if q_lora_rank is None else None
        self.q_a = self.q_a_norm = self.q_b = None
        if q_lora_rank is not None:
            self.q_a = Linear(dim, q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(q_lora_rank, _LATENT_EPS)
            self.q_b = Linear(q_lora_rank, q_dim, bias=False)
        self.kv_a = Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_norm = RMSNorm(kv_lora_rank, _LATENT_EPS)
        self.kv_b = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.out = Linear(num_heads * v_head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        rope: RotaryEmbedding,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: CacheStep | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Arguments and result as those of `Attention.forward`. A layer's k_cache is (num_blocks, block_size, 1,
        kv_lora_rank + qk_rope_head_dim); its v_cache the view of the first kv_lora_rank features."""
        if positions is None and x.ndim == 2:
            raise ValueError("positions is None; accepted with packed tokens: the position of each, (total,)")
        q = self.q(x) if self.q is not None else self.q_b(self.q_a_norm(self.q_a(x)))
        q = q.unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_norm(latent)
        q_rope, k_rope = rope(q_rope, positions), rope(k_rope.unsqueeze(-2), positions)
        if cache is None:
            out = self._attend(q_nope, q_rope, latent, k_rope, cu_seqlens)
        else:
            out = self._attend_cached(q_nope, q_rope, latent.unsqueeze(-2), k_rope, cache, layer)
        return self.out(out.flatten(-2))

    def _attend(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, v = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), dim=-1)
        return ops.attention(
            torch.cat((q_nope, q_rope), dim=-1), k, v, causal=True, scale=self.scale, cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
        )  # fmt: skip

    def _attend_cached(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: CacheStep, layer: int
    ) -> Tensor:
        k_cache, v_cache = cache.k_caches[layer], cache.v_caches[layer]
        # v_cache is a part of k_cache: what is written there is there already
        ops.kv_cache_write(torch.cat((latent, k_rope), dim=-1), latent, k_cache, v_cache, cache.slot_mapping)
        to_k, to_v = self.kv_b.weight.unflatten(0, (self.num_heads, -1)).split(
            (self.qk_nope_head_dim, self.v_head_dim), dim=1
        )
        q_latent = torch.einsum("thn,hnl->thl", q_nope, to_k)
        out = ops.paged_attention(
            torch.cat((q_latent, q_rope), dim=-1), k_cache, v_cache, cache.block_table, cache.kv_lens,
            cu_seqlens_q=cache.cu_seqlens_q, causal=True, scale=self.scale,
        )  # fmt: skip
        return torch.einsum("thl,hvl->thv", out, to_v)
