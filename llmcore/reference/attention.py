"""Scaled dot-product attention, dense, packed and paged, by writing the score matrix down.

Masks are bottom-right aligned: the last query stands at the last key. A row that sees no key gives 0 and lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_indices, check_offsets, check_shape
from llmcore.reference.kv_cache import LARGEST_ELEMENT


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Of q (..., heads, head_dim), k (..., kv_heads, head_dim) and v (..., kv_heads, v_head_dim)."""
    check(
        q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1] and k.shape[-2] and q.shape[-2] % k.shape[-2] == 0,
        f"{op}: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; k must have q's head size "
        "and v's leading dimensions, and the heads of q must be a multiple of those of k",
    )


def _visible(num_q: int, num_k: int, causal: bool, window: int | None, device) -> Tensor:
    """(num_q, num_k) bool: which keys a query sees by position."""
    distance = (torch.arange(num_q, device=device) + num_k - num_q)[:, None] - torch.arange(num_k, device=device)
    seen = torch.ones(num_q, num_k, dtype=torch.bool, device=device)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def _bias(table: Tensor, num_q: int, num_k: int, heads: int) -> Tensor:
    """(heads, num_q, num_k): the column of `table`, (heads, 2 * reach + 1), for each distance from query to key."""
    check(
        table.dim() == 2 and len(table) == heads and table.shape[1] % 2 == 1,
        f"attention: position_bias has shape {tuple(table.shape)}; expected ({heads} heads, an odd number)",
    )
    reach = table.shape[1] // 2
    query = torch.arange(num_q, device=table.device) + num_k - num_q
    offset = torch.arange(num_k, device=table.device) - query[:, None]
    return table[:, offset.clamp(-reach, reach) + reach]


def _attend(q, k, v, seen, scale, softcap, sinks, position_bias=None) -> tuple[Tensor, Tensor]:
    """q (batch, num_q, heads, dim); k, v (batch, num_k, kv_heads, dim); seen broadcasts to (batch, heads, num_q,
    num_k). Returns out (batch, num_q, heads, v_dim) and lse (batch, heads, num_q).

    Scores and sums are in float32 (float64 for float64 inputs); the probabilities are rounded to v's dtype before they
    meet v, as a tensor core takes them.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    k = k.to(wide).repeat_interleave(group, dim=2)
    v_wide = v.to(wide).repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + _bias(position_bias.to(wide), q.shape[1], k.shape[1], q.shape[2])
    scores = scores.masked_fill(~seen, float("-inf"))
    highest = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:3], 1), float("-inf"))
    )
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        highest = torch.maximum(highest, sink.detach())
    highest = torch.where(torch.isfinite(highest), highest, 0)
    p = torch.exp(scores - highest)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - highest)
    safe = torch.where(total > 0, total, 1)
    out = torch.einsum("bhqk,bkhd->bqhd", (p / safe).to(v.dtype).to(wide), v_wide).to(q.dtype)
    lse = torch.where(total > 0, torch.log(safe) + highest, float("-inf")).squeeze(-1)
    return out, lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block_mask=None,
    position_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `llmcore.ops.attention`."""
    check(
        q.dim() == k.dim() == (4 if cu_seqlens_q is None else 3) and (q.dim() == 3 or q.shape[0] == k.shape[0]),
        f"attention: q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; expected (batch, seq, heads, head_dim)"
        ", or (total, heads, head_dim) with cu_seqlens_q",
    )
    _check_heads("attention", q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(q, k, v, sequence=None):  # (batch, seq, heads, dim); sequence: which of the block mask's batch
        seen = _visible(q.shape[1], k.shape[1], causal, window, q.device)
        if block_mask is not None:
            blocks = block_mask.dense(q.shape[1], k.shape[1]).to(q.device)
            seen = seen & (blocks if sequence is None or blocks.shape[0] == 1 else blocks[sequence : sequence + 1])
        return _attend(q, k, v, seen, scale, softcap, sinks, position_bias)

    if cu_seqlens_q is None:
        out, lse = one(q, k, v)
        return (out, lse) if return_lse else out
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    batch = len(cu_seqlens_q) - 1
    starts_q = check_offsets("attention: cu_seqlens_q", cu_seqlens_q, batch, q.shape[0])
    starts_k = check_offsets("attention: cu_seqlens_k", cu_seqlens_k, batch, k.shape[0])
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[-1])], []
    for b, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:])):
        out, lse = one(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], b)
        outs.append(out[0])
        lses.append(lse[0])
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=-1)) if return_lse else out


def gather_cache(cache: Tensor, scale: Tensor | None, block_table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` tokens of one sequence out of a paged cache: (length, kv_heads, head_dim) in `dtype`."""
    block_size = cache.shape[1]
    blocks = block_table[: -(-length // block_size)].long()
    tokens = cache[blocks].flatten(0, 1)[:length].to(dtype)
    return tokens if scale is None else tokens * scale[blocks].flatten(0, 1)[:length].to(dtype)[..., None]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `llmcore.ops.paged_attention`."""
    _check_heads("paged_attention", q, k_cache, v_cache)
    batch, max_blocks = block_table.shape
    num_blocks, block_size = k_cache.shape[:2]
    check(block_size >= 1, f"paged_attention: k_cache has shape {tuple(k_cache.shape)}; a block holds at least 1 token")
    check_shape("paged_attention: kv_lens", kv_lens, batch)
    check_indices("paged_attention: kv_lens", kv_lens, 0, max_blocks * block_size + 1)
    used = torch.arange(max_blocks, device=q.device) * block_size < kv_lens[:, None]
    check_indices("paged_attention: block_table", block_table[used], 0, num_blocks)
    for scale_of in (k_scale, v_scale):
        check(
            (scale_of is not None) == (k_cache.dtype in LARGEST_ELEMENT),
            f"paged_attention: scales go with int8 and float8_e4m3fn caches; the caches have {k_cache.dtype}",
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = kv_lens.tolist()
    starts = torch.arange(batch + 1) if cu_seqlens_q is None else cu_seqlens_q
    starts = check_offsets("paged_attention: cu_seqlens_q", starts, batch, q.shape[0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs = [q.new_empty(0, q.shape[1], v_cache.shape[-1])]
    for row, length in enumerate(lengths):
        queries = q[None, starts[row] : starts[row + 1]]
        k = gather_cache(k_cache, k_scale, block_table[row], length, wide)
        v = gather_cache(v_cache, v_scale, block_table[row], length, wide)
        seen = _visible(queries.shape[1], length, causal, window, q.device)
        outs.append(_attend(queries, k[None], v[None], seen, scale, softcap, sinks, position_bias)[0][0])
    return torch.cat(outs)
