"""The paged cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_shape

# dtypes of 8 bits, whose elements stand for element * scale -> their largest element
LARGEST_ELEMENT = {torch.int8: 127, torch.float8_e4m3fn: 448}


def kv_cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See `llmcore.ops.kv_cache_write`."""
    num_blocks, block_size = k_cache.shape[:2]
    tokens, kv_heads = k.shape[:2]
    check_shape("kv_cache_write: slot_mapping", slot_mapping, tokens)
    for name, new, cache, scale in (("k", k, k_cache, k_scale), ("v", v, v_cache, v_scale)):
        check_shape(f"kv_cache_write: {name}", new, tokens, kv_heads, new.shape[-1])
        check_shape(f"kv_cache_write: {name}_cache", cache, num_blocks, block_size, kv_heads, new.shape[-1])
        check(
            (scale is not None) == (cache.dtype in LARGEST_ELEMENT),
            f"kv_cache_write: {name}_scale goes with int8 and float8_e4m3fn caches; the cache has {cache.dtype}",
        )
    slots = slot_mapping.long()
    outside = (slots < -1) | (slots >= num_blocks * block_size)
    if outside.any():
        token = outside.nonzero()[0].item()
        raise RuntimeError(
            f"kv_cache_write: slot {slots[token].item()} (token {token}) is outside the cache of "
            f"{num_blocks * block_size} slots; accepted: 0 to {num_blocks * block_size - 1}, or -1 to skip"
        )
    written = slots >= 0
    distinct, counts = slots[written].unique(return_counts=True)
    if (counts > 1).any():
        raise RuntimeError(
            f"kv_cache_write: slot {distinct[counts > 1][0].item()} is given to more than one token; "
            "every slot but -1 may occur once"
        )
    where = slots[written] // max(block_size, 1), slots[written] % max(block_size, 1)
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if new.shape[-1] == 0:  # nothing to hold, nor to scale
            continue
        rows = new[written]
        if cache.dtype in LARGEST_ELEMENT:
            rows, scales = quantise(rows, cache.dtype)
            scale[where] = scales.to(scale.dtype)
        cache[where] = rows.to(cache.dtype)


def quantise(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., dim) -> elements of `dtype`, which has 8 bits, and (...,) float32 scales. The arithmetic is defined in
    float32, whatever the input: a cache of 8 bits holds the same bits from every backend."""
    most = LARGEST_ELEMENT[dtype]
    wide = rows.float()
    largest = wide.abs().amax(-1)
    scale = largest / torch.full_like(largest, most)
    usable = (scale > 0) & scale.isfinite()
    quotient = wide / torch.where(usable, scale, torch.ones_like(scale)).unsqueeze(-1)
    quotient = (quotient.round() if dtype == torch.int8 else quotient).clamp(-most, most)
    q = torch.where(usable.unsqueeze(-1), quotient, torch.zeros_like(wide))
    return q.to(dtype), torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))
