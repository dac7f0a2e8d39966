"""The sizes that the CUDA kernels are timed at (bench/gpu.py): those of models that a GPU is bought for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import moe_layer
from llmcore.ops import Sample, registry, rope_tables

# (op, case, direction) -> what llmcore must reach on an H200: times the speed of a peer, or GB/s.
MUST: dict[tuple[str, str, str], dict[str, float]] = {
    ("moe_layer", "32768 tokens, top 8 of 128, 2048x768", "forward"): {"torch": 1.2, "torch_gathered": 1.2},
    ("moe_layer", "32768 tokens, top 8 of 128, 2048x768", "backward"): {"torch": 1.0, "torch_gathered": 1.0},
    ("grouped_glu", "128 experts, about 1 row each", "forward"): {"gbytes": 3000},
    ("grouped_gemm", "128 experts, about 1 row each", "forward"): {"gbytes": 3000},
    ("moe_route", "32768 tokens, top 8 of 128", "forward"): {"torch": 5.0},
    ("linear_cross_entropy", "8k tokens, H 4096, V 128k", "forward+backward"): {"torch": 1.5},
    ("sample", "128 rows, V 128k, top-k + top-p", "forward"): {"torch": 5.0},
    ("optimizer", "AdamW + clipping, 1.0 B parameters", "step"): {"torch": 1.0, "gbytes": 3700},
}

Cases = Iterator[Sample]
_CASES: dict[str, Callable[[torch.dtype, str], Cases]] = {}


def case(*ops: str) -> Callable:
    def register(function: Callable) -> Callable:
        _CASES.update(dict.fromkeys(ops, function))
        return function

    return register


def benchmarks(op: str, dtype: torch.dtype, device: str) -> Cases:
    """An op's cases, or those of the registry for an op that has none here."""
    if op in _CASES:
        yield from _CASES[op](dtype, device)
    elif registry[op].benchmarks is not None:
        for sample in registry[op].benchmarks(dtype, "cpu"):
            yield sample.to(device)


@case("attention")
def attention(dtype: torch.dtype, device: str) -> Cases:
    for batch, seq, heads, kv_heads, dim, causal in (
        (4, 4096, 32, 8, 128, True),
        (4, 4096, 32, 8, 128, False),
        (1, 16384, 32, 8, 128, True),
        (8, 2048, 16, 16, 64, True),
        (4, 4096, 16, 16, 256, True),
    ):
        q, k, v = (torch.randn(batch, seq, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        label = f"{'causal ' * causal}{batch}x{seq}x{heads}/{kv_heads}x{dim}"
        yield Sample(label, (q, k, v), {"causal": causal}, (0, 1, 2))
    q, k = (torch.randn(2, 4096, 16, 192, device=device, dtype=dtype) for _ in range(2))
    v = torch.randn(2, 4096, 16, 128, device=device, dtype=dtype)
    yield Sample("causal 2x4096x16x192/128", (q, k, v), {"causal": True}, (0, 1, 2))


def _paged(batch: int, length: int, heads: int, kv_heads: int, dim: int, v_dim: int, dtype, device) -> tuple:
    pages = length // 16
    caches = [torch.randn(batch * pages, 16, kv_heads, d, device=device, dtype=dtype) for d in (dim, v_dim)]
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    return torch.randn(batch, heads, dim, device=device, dtype=dtype), *caches, table, lengths


@case("paged_attention")
def paged_attention(dtype: torch.dtype, device: str) -> Cases:
    for batch, length in ((1, 1024), (1, 8192), (32, 4096), (64, 2048), (128, 8192)):
        call = _paged(batch, length, 32, 8, 128, 128, dtype, device)
        yield Sample(f"decode 32/8x128, batch {batch}, {length} keys", call)
    call = _paged(64, 4096, 128, 1, 576, 512, dtype, device)
    yield Sample("decode MLA 128x576/512, batch 64, 4096 keys", call)


@case("kv_cache_write")
def kv_cache_write(dtype: torch.dtype, device: str) -> Cases:
    for tokens in (64, 16384):
        k, v = (torch.randn(tokens, 8, 128, device=device, dtype=dtype) for _ in range(2))
        caches = [torch.zeros(tokens // 8, 16, 8, 128, device=device, dtype=dtype) for _ in range(2)]
        slots = torch.randperm(tokens * 2, device=device)[:tokens]
        yield Sample(f"{tokens} tokens, 8x128", (k, v, *caches, slots))


def _rows(dim: int, dtype: torch.dtype, device: str, tokens: int = 16384) -> Tensor:
    return torch.randn(tokens, dim, device=device, dtype=dtype)


@case("rms_norm")
def rms_norm(dtype: torch.dtype, device: str) -> Cases:
    for dim in (1024, 4096, 8192):
        weight = torch.ones(dim, device=device, dtype=dtype)
        yield Sample(f"16384x{dim}", (_rows(dim, dtype, device), weight), {}, (0, 1))
        residual = {"residual": _rows(dim, dtype, device)}
        yield Sample(f"16384x{dim} + residual", (_rows(dim, dtype, device), weight), residual, (0, 1, "residual"))


@case("layer_norm")
def layer_norm(dtype: torch.dtype, device: str) -> Cases:
    weight, bias = torch.ones(4096, device=device, dtype=dtype), torch.zeros(4096, device=device, dtype=dtype)
    yield Sample("16384x4096", (_rows(4096, dtype, device), weight, bias), {}, (0, 1, 2))


@case("dyt")
def dyt(dtype: torch.dtype, device: str) -> Cases:
    weight, bias = torch.ones(4096, device=device, dtype=dtype), torch.zeros(4096, device=device, dtype=dtype)
    alpha = torch.full((1,), 0.5, device=device, dtype=dtype)
    yield Sample("16384x4096", (_rows(4096, dtype, device), alpha, weight, bias), {}, (0, 1, 2, 3))


@case("rope")
def rope(dtype: torch.dtype, device: str) -> Cases:
    qkv = torch.randn(4, 4096, 48, 128, device=device, dtype=dtype)
    yield Sample("4x4096x32x128", (qkv[:, :, :32], *rope_tables(4096, 128, device=device)), {}, (0,))


@case("swiglu", "geglu")
def glu(dtype: torch.dtype, device: str) -> Cases:
    gate, up = _rows(2 * 14336, dtype, device, 8192).chunk(2, -1)
    yield Sample("8192x14336", (gate, up), {}, (0, 1))


@case("linear_cross_entropy")
def linear_cross_entropy(dtype: torch.dtype, device: str) -> Cases:
    tokens, dim, vocab = 8192, 4096, 131072
    hidden, weight = (torch.randn(n, dim, device=device, dtype=dtype) for n in (tokens, vocab))
    targets = torch.randint(vocab, (tokens,), device=device)
    yield Sample("8k tokens, H 4096, V 128k", (hidden, weight * dim**-0.5, targets), {}, (0, 1))


@case("sample")
def sample(dtype: torch.dtype, device: str) -> Cases:
    rows, vocab = 128, 131072
    logits = torch.randn(rows, vocab, device=device, dtype=dtype) * 2
    draws = {"seeds": torch.arange(rows, device=device), "positions": torch.full((rows,), 7, device=device)}
    filters = {
        "temperature": torch.full((rows,), 0.8, device=device),
        "top_k": torch.full((rows,), 50, device=device),
        "top_p": torch.full((rows,), 0.9, device=device),
        "min_p": torch.zeros(rows, device=device),
    }
    yield Sample(f"{rows} rows, V 128k, top-k + top-p", (logits,), filters | draws)
    yield Sample(f"{rows} rows, V 128k, no filter", (logits,), draws)


@case("apply_penalties_")
def apply_penalties_(dtype: torch.dtype, device: str) -> Cases:
    rows, vocab, seen = 128, 131072, 2048
    logits = torch.randn(rows, vocab, device=device, dtype=dtype)
    tokens = torch.randint(vocab, (rows, seen), device=device)
    prompt_lens = torch.full((rows,), seen // 2, device=device)
    penalties = {"repetition": 1.1, "presence": 0.5, "frequency": 0.25}
    settings = {name: torch.full((rows,), value, device=device) for name, value in penalties.items()}
    yield Sample(f"{rows} rows, V 128k, {seen} tokens", (logits, tokens, prompt_lens), settings)


def _experts(dim: int, ffn: int, first: bool, dtype: torch.dtype, device: str) -> Cases:
    """A layer of 128 experts, 8 for each token, in training and in decoding: the first product, which gathers its rows,
    or the second."""
    experts, top_k = 128, 8
    n, k = (2 * ffn, dim) if first else (dim, ffn)
    weight = torch.randn(experts, n, k, device=device, dtype=dtype) * k**-0.5
    for label, tokens in (("32k tokens", 32768), ("about 1 row each", experts // top_k)):
        of_rows, order = torch.randint(experts, (tokens * top_k,), device=device).sort()
        offsets = torch.searchsorted(of_rows, torch.arange(experts + 1, device=device), out_int32=True)
        gathered = {"token_of": (order // top_k).int(), "row_of": order.argsort().view(tokens, top_k).int()}
        x = torch.randn(tokens if first else tokens * top_k, k, device=device, dtype=dtype)
        yield Sample(f"128 experts, {label}", (x, weight, offsets), gathered if first else {}, (0, 1))


@case("grouped_glu")
def grouped_glu(dtype: torch.dtype, device: str) -> Cases:
    yield from _experts(2048, 768, True, dtype, device)


@case("grouped_gemm")
def grouped_gemm(dtype: torch.dtype, device: str) -> Cases:
    yield from _experts(2048, 768, False, dtype, device)


@case("moe_layer")
def layer(dtype: torch.dtype, device: str) -> Cases:
    yield moe_layer.sample(dtype, device, tokens=32768, dim=2048, ffn_dim=768, experts=128, top_k=8)
