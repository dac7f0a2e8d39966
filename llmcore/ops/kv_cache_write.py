"""Writing new keys and values into a paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, FLOATS, OpSpec, Sample, register, register_fake, use_kernel


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
    """Writes token t's keys and values to slot `slot_mapping[t]` of a paged cache, in place.

    The page table is that of Kwon et al., "PagedAttention" (arXiv 2309.06180): slot = block * block_size + offset. A
    float cache of another dtype than k's converts (rounding to nearest even). A cache of 8 bits is quantised per token
    and head: scale = max|x| / 127 (int8) or max|x| / 448 (float8_e4m3fn), element = x / scale, rounded to nearest even,
    so x is about element * scale. A row of zeros gets scale 0; a row that holds inf or NaN gets scale NaN, so that it
    reads back as NaN; the elements of both are 0.

    Args:
        k: (tokens, kv_heads, head_dim), float32, bfloat16 or float16 (float64 through the reference); strides free.
        v: (tokens, kv_heads, v_head_dim), k's dtype; strides free.
        k_cache, v_cache: (num_blocks, block_size, kv_heads, head_dim or v_head_dim), float32, bfloat16, float16, int8
            or float8_e4m3fn, both alike; strides free but for a contiguous last dimension. Mutated; not differentiable.
        slot_mapping: (tokens,), int32 or int64: the slot of each token, -1 to skip it (padding).
        k_scale, v_scale: (num_blocks, block_size, kv_heads) float32, mutated; given when, and only when, the cache has
            8 bits.

    Raises:
        RuntimeError: a slot outside the cache or given twice, by value; a shape, dtype or device that does not fit.
            Nothing has been written then.
    """
    if not use_kernel("kv_cache_write", k):
        return reference.kv_cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    return torch.ops.llmcore.kv_cache_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


@register_fake("kv_cache_write")
def _(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    return None


def _on_copies(function):
    """The op on copies of the caches (a sample is used more than once), returning them."""

    def run(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None):
        k_cache, v_cache, k_scale, v_scale = (
            t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            for t in (k_cache, v_cache, k_scale, v_scale)
        )
        function(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return tuple(t for t in (k_cache, v_cache, k_scale, v_scale) if t is not None)

    run.in_place = function
    return run


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def slots(tokens: int, total: int, index_dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randperm(total, generator=make)[:tokens].to(device, index_dtype)

    def caches(cache_dtype: torch.dtype, blocks: int, block_size: int, heads: int, dim: int, v_dim: int):
        shape = (blocks, block_size, heads)
        if cache_dtype in reference.LARGEST_ELEMENT:
            tensors = [torch.full((*shape, d), -5, dtype=cache_dtype, device=device) for d in (dim, v_dim)]
            scales = [torch.full(shape, 0.5, device=device) for _ in range(2)]
            return tensors, {"k_scale": scales[0], "v_scale": scales[1]}
        return [torch.full((*shape, d), 7.0, dtype=cache_dtype, device=device) for d in (dim, v_dim)], {}

    for cache_dtype in (dtype, *reference.LARGEST_ELEMENT, *(d for d in FLOATS if d != dtype)):
        label = str(cache_dtype).removeprefix("torch.")
        for tokens, heads, dim, v_dim in ((5, 2, 16, 16), (1, 1, 1, 1), (13, 3, 59, 111), (0, 2, 8, 8)):
            tensors, scales = caches(cache_dtype, 5, 3, heads, dim, v_dim)
            k, v = randn(tokens, heads, dim), randn(tokens, heads, v_dim)
            yield Sample(f"{label}: {(tokens, heads, dim, v_dim)}", (k, v, *tensors, slots(tokens, 15)), scales)
        tensors, scales = caches(cache_dtype, 4, 4, 2, 24, 16)
        qkv = randn(7, 6, 40)
        mapping = slots(7, 16, torch.int32)
        mapping[2:5] = -1
        k, v = qkv[:, 1:3, :24], qkv[:, 3:5, 24:]
        yield Sample(f"{label}: strided, skipped tokens", (k, v, *tensors, mapping), scales)
        tensors, scales = caches(cache_dtype, 4, 4, 2, 24, 0)
        yield Sample(f"{label}: no values", (randn(3, 2, 24), randn(3, 2, 0), *tensors, slots(3, 16)), scales)
    for cache_dtype in reference.LARGEST_ELEMENT:
        label = str(cache_dtype).removeprefix("torch.")
        tensors, scales = caches(cache_dtype, 4, 4, 3, 20, 20)
        k, v = randn(6, 3, 20), randn(6, 3, 20)
        k[1] = 0
        v[2, 1] = 0
        yield Sample(f"{label}: rows of zeros", (k, v, *tensors, slots(6, 16)), scales)
        k, v = randn(6, 3, 20), randn(6, 3, 20)
        k[3], v[3] = torch.nan, torch.inf
        mapping = slots(6, 16)
        mapping[3] = -1
        tensors, scales = caches(cache_dtype, 4, 4, 3, 20, 20)
        yield Sample(f"{label}: skipped token is NaN", (k, v, *tensors, mapping), scales, poison=True)


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    k, v = torch.randn(2, 2048, 8, 128).to(device, dtype)
    k_cache, v_cache = torch.zeros(2, 512, 16, 8, 128).to(device, dtype)
    blocks = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:128]
    mapping = (blocks[:, None] * 16 + torch.arange(16)).flatten().to(device)
    yield Sample("2048 tokens, 8x128", (k, v, k_cache, v_cache, mapping))


def _peer(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None) -> tuple[Tensor, Tensor]:
    """A scatter of rows; the caches are contiguous, and float."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, new.to(cache.dtype))
    return k_cache, v_cache


register(
    OpSpec(
        name="kv_cache_write",
        op=_on_copies(kv_cache_write),
        reference=_on_copies(reference.kv_cache_write),
        torch_ops=("kv_cache_write",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("any page size", "converting", "int8 and fp8 with a scale per token and head", "padding tokens"),
        benchmarks=_benchmarks,
        peer=_on_copies(_peer),
        bytes=lambda s: sum(t.numel() * (t.element_size() + c.element_size()) for t, c in zip(s.args[:2], s.args[2:4])),
    )
)
