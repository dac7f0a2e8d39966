"""From a fused projection to attention's queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from llmcore.reference.checks import check
from llmcore.reference.kv_cache import kv_cache_write
from llmcore.reference.norms import rms_norm
from llmcore.reference.rope import rope


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `llmcore.ops.qk_norm_rope`."""
    heads = (num_heads, num_kv_heads, num_kv_heads)
    check(min(heads) >= 1, f"qk_norm_rope: num_heads is {num_heads}, num_kv_heads {num_kv_heads}; accepted: 1 or more")
    check(
        qkv.dim() in (2, 3) and qkv.shape[-1] > 0 and qkv.shape[-1] % sum(heads) == 0,
        f"qk_norm_rope: qkv has shape {tuple(qkv.shape)}; expected (batch, seq, features) or (total, features) with "
        f"features = {sum(heads)} heads times head_dim",
    )
    check((cos is None) == (sin is None), "qk_norm_rope: cos and sin go together")
    q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, dim=-2)
    q, k = (x if w is None else rms_norm(x, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    if cos is not None:
        q, k = (rope(x, cos, sin, positions, interleaved=interleaved) for x in (q, k))
    return q, k, v


def qk_norm_rope_cache_write(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `llmcore.ops.qk_norm_rope_cache_write`."""
    check(qkv.dim() == 2, f"qk_norm_rope_cache_write: qkv has shape {tuple(qkv.shape)}; expected (tokens, features)")
    q, k, v = qk_norm_rope(
        qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved=interleaved
    )
    kv_cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    return q
