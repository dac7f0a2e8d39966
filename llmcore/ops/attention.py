"""Scaled dot-product attention on dense, packed and paged tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.block_mask import BlockMask
from llmcore.ops.registry import (
    FLOATS,
    HALVES,
    OpSpec,
    Sample,
    fall_back,
    refuse_gradient,
    register,
    register_fake,
    use_kernel,
)


def _options(
    op: str, q: Tensor, window: int | None, scale: float | None, softcap: float | None
) -> tuple[int, float, float]:
    """(window, scale, softcap) as the schemas take them, 0 for none."""
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; it must be at least 1, or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, or None")
    if scale is None:  # a q without a head_dim, or with an empty one, is refused where shapes are checked
        scale = max(q.shape[-1:].numel(), 1) ** -0.5
    return window or 0, scale, softcap or 0.0


CUDA_HEAD_DIM = 576  # the largest that the CUDA kernels take (kMaxHeadDim of csrc/cuda/attention.cu)


def _use_kernel(op: str, q: Tensor, position_bias: Tensor | None = None, softcap: float | None = None) -> bool:
    """`use_kernel`, which looks at device and dtype alone, then the bias, and on CUDA devices the head size."""
    served = use_kernel(op, q)
    if served and position_bias is not None and (q.is_cuda or softcap is not None):
        fall_back(f"the kernel of {op} takes a position_bias on the CPU alone, and none beside a softcap")
        return False
    if served and q.is_cuda and q.shape[-1] > CUDA_HEAD_DIM:
        fall_back(f"the cuda kernel of {op} takes head sizes up to {CUDA_HEAD_DIM}, not {q.shape[-1]}")
        return False
    return served


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
    block_mask: BlockMask | None = None,
    position_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v by tiles, in memory linear in the sequence (FlashAttention, arXiv 2205.14135).

    Masks are bottom-right aligned: the last query stands at the last key, so with fewer queries than keys a causal
    query sees the whole past. A query that sees no key gives 0 and lse = -inf.

    Args:
        q: (batch, seq_q, heads, head_dim), or packed (total_q, heads, head_dim) with `cu_seqlens_q`; float32, bfloat16
            or float16 (float64 through the reference). Strides are free; the last dimension is best contiguous. The
            CUDA kernel takes head sizes up to 576; larger ones take the reference, with a warning.
        k: (batch, seq_k, kv_heads, head_dim) or (total_k, kv_heads, head_dim); kv_heads divides heads (GQA, MQA).
        v: as k, its head size may differ from k's.
        causal: a query sees no later key.
        window: a query sees keys less than `window` positions away: `window` keys, itself included, when causal.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); 1e-30 to 1e30.
        sinks: (heads,): a further score of each head that takes part in the softmax and has no value (gpt-oss).
        block_mask: which key blocks a query block sees, on top of the other masks.
        position_bias: (heads, 2 * reach + 1) floats added to the scores (after softcap and scale) by distance: a key
            d places after the query, in the numbering of the masks, takes column d + reach, one farther than reach away
            the first or last column (T5, arXiv 1910.10683). Differentiable. CUDA, and a softcap beside it, take the
            reference, with a warning.
        cu_seqlens_q: int32 (batch + 1,): where each sequence's queries start in the packed q; ends with total_q.
        cu_seqlens_k: the same for k and v; `cu_seqlens_q` by default.
        return_lse: also return the log of each row's sum of exponentials (differentiable).
        deterministic: asks for gradients with the same bits in every run; torch.use_deterministic_algorithms(True)
            asks for them everywhere. It is the forward call's setting that counts. Outputs, lse and the gradients of k,
            v and sinks always have the same bits (on a CPU: for the same number of threads). The gradient of q has them
            on a CPU and on CUDA with this; else CUDA sums it by atomic additions, in an order that is open, with
            fewer matrix products. Where no kernel of that kind fits the head size, CUDA is deterministic anyway.

    Returns:
        out, shaped as q with v's head size and typed as q; with `return_lse` also lse, float32, (batch, heads, seq_q)
        or packed (heads, total_q).

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit, offsets that don't run from 0 to the number of rows, a
            scale or softcap beyond float32; each names the value.
        ValueError: window < 1 or softcap <= 0.
    """
    options = _options("attention", q, window, scale, softcap)
    if not _use_kernel("attention", q, position_bias, softcap):
        return reference.attention(
            q, k, v, causal=causal, window=window, scale=options[1], softcap=softcap, sinks=sinks,
            block_mask=block_mask, position_bias=position_bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse,
        )  # fmt: skip
    out, lse = torch.ops.llmcore.attention(
        q, k, v, *(None if t is None else t.float() for t in (sinks, position_bias)),
        None if block_mask is None else block_mask.mask, cu_seqlens_q, cu_seqlens_k, causal, *options,
        block_mask.block_q if block_mask else 0, block_mask.block_k if block_mask else 0,
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@register_fake("attention")
def _(q, k, v, *rest):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return out, q.new_empty(shape, dtype=torch.float32)


@register_fake("attention_backward")
def _(dout, dlse, q, k, v, out, lse, sinks, position_bias, *rest):
    contiguous = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    shapes = [0 if t is None else t.shape for t in (sinks, position_bias)]
    return (*contiguous, *(q.new_empty(shape, dtype=torch.float32) for shape in shapes))


def _save(ctx, inputs, output):
    q, k, v, sinks, position_bias, block_mask, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.options = options
    ctx.save_for_backward(q, k, v, *output, sinks, position_bias, block_mask, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, sinks, position_bias, block_mask, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 15
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks, dbias = torch.ops.llmcore.attention_backward(
        dout, dlse, q, k, v, out, lse, sinks, position_bias, block_mask, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    dsinks, dbias = None if sinks is None else dsinks, None if position_bias is None else dbias
    return (dq, dk, dv, dsinks, dbias) + (None,) * 10


torch.library.register_autograd("llmcore::attention", _backward, setup_context=_save)


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
    """Attention of new queries over a paged cache (PagedAttention, arXiv 2309.06180): decode and chunked prefill.

    Key j of sequence b lies in block `block_table[b, j // block_size]`, slot `j % block_size`. A sequence's last query
    stands at its last key, which must be in the cache already (`kv_cache_write`). Not differentiable.

    Args:
        q: (batch, heads, head_dim), one query for each sequence; or packed (total_q, heads, head_dim) with
            `cu_seqlens_q`. float32, bfloat16 or float16.
        k_cache: (num_blocks, block_size, kv_heads, head_dim), float32, bfloat16 or float16; int8 or float8_e4m3fn with
            scales. An fp8 element of NaN, which `kv_cache_write` never leaves, may be taken for a number.
        v_cache: (num_blocks, block_size, kv_heads, v_head_dim), k_cache's dtype.
        block_table: int32 (batch, max_blocks). Entries beyond a sequence's length are not read.
        kv_lens: int32 (batch,): keys of each sequence, the new ones included.
        cu_seqlens_q: int32 (batch + 1,): where each sequence's queries start in q.
        causal, window, scale, softcap, sinks, position_bias: as in `attention`.
        k_scale, v_scale: float32 (num_blocks, block_size, kv_heads): an element stands for element * scale. Given when,
            and only when, the caches have 8 bits.

    Returns:
        (batch or total_q, heads, v_head_dim), typed as q.

    Raises:
        RuntimeError: a block id outside the cache, a length beyond the table, or shapes that don't fit.
        ValueError: window < 1 or softcap <= 0.
    """
    options = _options("paged_attention", q, window, scale, softcap)
    if not _use_kernel("paged_attention", q, position_bias, softcap):
        return reference.paged_attention(
            q, k_cache, v_cache, block_table, kv_lens, cu_seqlens_q=cu_seqlens_q, causal=causal, window=window,
            scale=options[1], softcap=softcap, sinks=sinks, position_bias=position_bias, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
    return torch.ops.llmcore.paged_attention(
        q, k_cache, v_cache, block_table, kv_lens, cu_seqlens_q, None if sinks is None else sinks.float(),
        None if position_bias is None else position_bias.float(), k_scale, v_scale, causal, *options,
    )  # fmt: skip


@register_fake("paged_attention")
def _(q, k_cache, v_cache, *rest):
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


refuse_gradient("paged_attention")


# ---- what tests and benchmarks call ----------------------------------------------------------------------------------


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def dense(label, batch, seq_q, seq_k, heads, kv_heads, dim, v_dim=None, **kwargs):
        args = (
            randn(batch, seq_q, heads, dim),
            randn(batch, seq_k, kv_heads, dim),
            randn(batch, seq_k, kv_heads, v_dim or dim),
        )
        differentiable = (0, 1, 2, *(name for name in ("sinks", "position_bias") if name in kwargs))
        return Sample(label, args, {"return_lse": True, **kwargs}, differentiable, cpu_only="position_bias" in kwargs)

    def bias(heads, reach):
        return torch.randn(heads, 2 * reach + 1, generator=make)

    yield dense("tiny", 1, 3, 5, 1, 1, 4)
    yield dense("MHA", 2, 65, 65, 3, 3, 64)
    yield dense("causal, GQA", 2, 63, 63, 6, 2, 32, causal=True)
    yield dense("causal, MQA, head size 59", 1, 70, 70, 4, 1, 59, causal=True)
    yield dense("fewer queries than keys", 1, 17, 150, 4, 2, 40, causal=True)
    yield dense("more queries than keys", 1, 90, 20, 2, 1, 16, causal=True)
    yield dense("one query", 2, 1, 129, 8, 2, 64, causal=True)
    yield dense("one query, one head, many keys", 1, 1, 700, 2, 1, 20)
    yield dense("no queries", 1, 0, 7, 2, 1, 8)
    yield dense("no keys", 1, 4, 0, 2, 1, 8)
    yield dense("empty batch", 0, 4, 4, 2, 1, 8)
    yield dense("window", 1, 200, 200, 2, 1, 24, causal=True, window=37)
    yield dense("window both sides", 1, 130, 150, 2, 2, 24, window=20)
    yield dense("window of 1", 1, 20, 20, 1, 1, 8, causal=True, window=1)
    yield dense("softcap", 1, 66, 66, 2, 1, 48, causal=True, softcap=5.0)
    yield dense("sinks", 2, 50, 50, 4, 2, 32, causal=True, sinks=torch.randn(4, generator=make), window=16)
    yield dense("head size 111, v 59, scale", 1, 40, 77, 2, 1, 111, 59, scale=0.3)
    yield dense("MLA 192/128", 1, 60, 60, 2, 2, 192, 128, causal=True)
    yield dense("MLA 576/512", 1, 3, 70, 16, 1, 576, 512, causal=True)
    mask = BlockMask.local(200, 200, 0, block_q=32, block_k=48) | BlockMask.strided(200, 200, 3, block_q=32, block_k=48)
    yield dense("block-sparse", 1, 200, 200, 2, 1, 16, causal=True, block_mask=mask)
    per_head = BlockMask(torch.rand(2, 4, 5, 6, generator=make) < 0.4, 16, 16)
    yield dense("block-sparse per head", 2, 80, 90, 4, 2, 16, block_mask=per_head)
    few = BlockMask(
        torch.tensor([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0] * 5]).bool()[None, :, None], 4, 64
    )
    yield dense("block-sparse, few queries", 2, 3, 300, 4, 2, 16, block_mask=few)
    wide = randn(2, 40, 3, 4, 96)
    yield Sample("strided", (wide[:, :, 0, :, :40], wide[:, :, 1, :2, 40:80], wide[:, :, 2, 1:3, 7:57]),
                 {"causal": True, "return_lse": True}, (0, 1, 2))  # fmt: skip
    columns = (randn(1, 9, 16, 2).transpose(2, 3), randn(1, 9, 2, 16), randn(1, 9, 2, 16))
    yield Sample("head dim not contiguous", columns, {"return_lse": True}, (0, 1, 2))
    lengths_q, lengths_k = [0, 1, 70, 0, 33], [5, 1, 70, 0, 100]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    packed = (randn(sum(lengths_q), 4, 32), randn(sum(lengths_k), 2, 32), randn(sum(lengths_k), 2, 48))
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    yield Sample("packed", packed, {**lengths, "return_lse": True}, (0, 1, 2))
    yield Sample("packed, causal, sinks", packed,
                 {**lengths, "causal": True, "sinks": torch.randn(4, generator=make), "return_lse": True},
                 (0, 1, 2, "sinks"))  # fmt: skip
    mask = BlockMask(torch.rand(5, 1, 5, 7, generator=make) < 0.5, 16, 16)
    yield Sample("packed, block-sparse", packed, {**lengths, "block_mask": mask, "return_lse": True}, (0, 1, 2))
    yield Sample("lse not asked for", (randn(1, 30, 2, 16), randn(1, 30, 2, 16), randn(1, 30, 2, 16)), {"causal": True},
                 (0, 1, 2))  # fmt: skip
    yield dense("position bias, GQA", 2, 140, 140, 4, 2, 24, position_bias=bias(4, 20), scale=1.0)
    yield dense("position bias, causal, window", 1, 90, 130, 2, 2, 16, causal=True, window=50, position_bias=bias(2, 7))
    yield dense("position bias, farther than the keys", 1, 70, 50, 2, 1, 16, causal=True, position_bias=bias(2, 300))
    yield dense("position bias of one, few queries, scale below 0", 2, 3, 200, 2, 1, 16, position_bias=bias(2, 0),
                scale=-0.5)  # fmt: skip
    yield Sample("packed, position bias, sinks", packed,
                 {**lengths, "position_bias": bias(4, 9), "sinks": torch.randn(4, generator=make), "return_lse": True},
                 (0, 1, 2, "position_bias", "sinks"), cpu_only=True)  # fmt: skip


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for label, heads, kv_heads, seq, dim in (
        ("MHA 8, S 512, D 64", 8, 8, 512, 64),
        ("GQA 32/8, S 512, D 128", 32, 8, 512, 128),
        ("GQA 32/8, S 2048, D 64", 32, 8, 2048, 64),
        ("GQA 32/8, S 2048, D 128", 32, 8, 2048, 128),
    ):
        q, k, v = (torch.randn(1, seq, h, dim).to(device, dtype) for h in (heads, kv_heads, kv_heads))
        yield Sample(label, (q, k, v), {"causal": True}, differentiable=(0, 1, 2))


def _peer(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _flops(sample: Sample) -> float:
    q, k, v = sample.args
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] / (2 if sample.kwargs.get("causal") else 1)
    return 2 * scores * (q.shape[-1] + v.shape[-1])


register(
    OpSpec(
        name="attention",
        op=attention,
        reference=reference.attention,
        torch_ops=("attention", "attention_backward"),
        samples=_samples,
        dtypes={"cpu": FLOATS, "cuda": HALVES},
        features=(
            "MHA, GQA, MQA; any head size, V's may differ", "causal (bottom-right), sliding window",
            "sinks, soft cap, block-sparse", "packed (cu_seqlens)", "lse", "backward, deterministic",
            "position bias on the CPU",
        ),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=_flops,
    )
)  # fmt: skip


def _paged_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def paged(label, lens, heads, kv_heads, dim, block_size, queries=None, v_dim=None, cache_dtype=None, **kwargs):
        v_dim = v_dim or dim
        blocks = [-(-n // block_size) for n in lens]
        num_blocks = sum(blocks) + 2
        k, v = (torch.randn(num_blocks, block_size, kv_heads, d, generator=make) for d in (dim, v_dim))
        order = torch.randperm(num_blocks, generator=make).int()
        # poison: unused table entries, unused blocks, slots beyond a sequence's end
        table = torch.full((len(lens), max([*blocks, 1]) + 1), 2147480000, dtype=torch.int32)
        used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
        start = 0
        for row, (n, count) in enumerate(zip(lens, blocks)):
            table[row, :count] = order[start : start + count]
            used[order[start : start + count].long()] = True
            if n % block_size:
                used[order[start + count - 1], n % block_size :] = False
            start += count
        if cache_dtype in reference.LARGEST_ELEMENT:
            k, k_scale = reference.quantise(k, cache_dtype)
            v, v_scale = reference.quantise(v, cache_dtype)
            for scale in (k_scale, v_scale):
                scale[~used] = float("nan")
            for cache in (k, v):
                cache.view(torch.uint8)[~used] = 0x7F  # the largest int8, and NaN of fp8
            kwargs |= {"k_scale": k_scale, "v_scale": v_scale}
        else:
            k, v = (t.to(cache_dtype or dtype) for t in (k, v))
            k[~used], v[~used] = float("nan"), float("nan")
        total = len(lens)
        if queries is not None:
            total = sum(queries)
            kwargs["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
        q = torch.randn(total, heads, dim, generator=make).to(dtype)
        args = (q, k, v, table, torch.tensor(lens, dtype=torch.int32))
        return Sample(label, args, kwargs, poison=True, cpu_only="position_bias" in kwargs)

    yield paged("decode, GQA", [1, 16, 70, 0, 33], 8, 2, 64, 16)
    yield paged("decode, split over keys", [1500], 4, 1, 32, 16)
    yield paged("decode, split, sinks", [1100], 4, 1, 16, 16, sinks=torch.randn(4, generator=make))
    yield paged("decode, page of 1, head size 59", [3, 9], 3, 3, 59, 1)
    yield paged("decode, page of 7, window", [90, 41], 4, 2, 24, 7, window=20)
    yield paged("decode, MLA", [75], 16, 1, 576, 64, v_dim=512)
    yield paged("decode, MLA, 128 heads", [40], 128, 1, 576, 16, v_dim=512)
    yield paged("decode, group of 72", [50], 72, 1, 64, 16, sinks=torch.randn(72, generator=make))
    yield paged("decode, 1 to 8 queries", [70, 9, 33, 0], 8, 2, 64, 7, queries=[8, 3, 1, 0])
    yield paged("decode, soft cap", [50, 20], 4, 4, 32, 32, softcap=5.0)
    yield paged("decode, int8", [50, 120, 1], 8, 2, 64, 16, cache_dtype=torch.int8)
    yield paged("decode, fp8", [50, 120, 1], 8, 2, 64, 16, cache_dtype=torch.float8_e4m3fn)
    yield paged("decode, fp8, page of 7, head size 59", [40, 9], 3, 1, 59, 7, cache_dtype=torch.float8_e4m3fn)
    yield paged("prefill in chunks", [64, 30, 100, 5], 8, 2, 32, 16, queries=[64, 10, 1, 0])
    yield paged("prefill, int8, MQA", [70, 40], 4, 1, 48, 16, queries=[70, 33], cache_dtype=torch.int8)
    yield paged("prefill, fp8, MQA", [70, 40], 4, 1, 48, 16, queries=[70, 33], cache_dtype=torch.float8_e4m3fn)
    yield paged("prefill, float32 cache", [70, 40], 2, 1, 32, 8, queries=[70, 3], cache_dtype=torch.float32)
    yield paged("prefill, not causal, sinks", [90], 2, 1, 32, 8, queries=[70], causal=False,
                sinks=torch.randn(2, generator=make))  # fmt: skip
    yield paged("no sequences", [], 2, 1, 8, 4)
    yield paged("decode, position bias", [1, 90, 1500, 0], 4, 2, 32, 16,
                position_bias=torch.randn(4, 41, generator=make))  # fmt: skip
    yield paged("prefill, position bias, int8", [90, 64], 4, 2, 32, 16, queries=[70, 3], cache_dtype=torch.int8,
                position_bias=torch.randn(4, 41, generator=make))  # fmt: skip


def _paged_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for batch, length in ((1, 4096), (8, 2048)):
        blocks = batch * length // 16
        k, v = (torch.randn(blocks, 16, 8, 128).to(device, dtype) for _ in range(2))
        table = torch.randperm(blocks).int().view(batch, -1)
        q = torch.randn(batch, 32, 128).to(device, dtype)
        lens = torch.full((batch,), length, dtype=torch.int32)
        yield Sample(f"decode, GQA 32/8, D 128, batch {batch}, {length} keys", (q, k, v, table, lens))


def _paged_peer(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, kv_lens: Tensor) -> Tensor:
    """The best arrangement in torch: gather the pages, then group the query heads of a KV head as queries."""
    batch, heads, dim = q.shape
    k, v = (c[block_table.long()].flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    grouped = q.view(batch, k.shape[1], -1, dim)
    return torch.nn.functional.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, -1)


def _paged_bytes(sample: Sample) -> float:
    _, k, v, _, lens = sample.args
    return int(lens.sum()) * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()


register(
    OpSpec(
        name="paged_attention",
        op=paged_attention,
        reference=reference.paged_attention,
        torch_ops=("paged_attention",),
        samples=_paged_samples,
        dtypes={"cpu": FLOATS, "cuda": HALVES},
        features=(
            "decode and chunked prefill", "any page size; split over the keys", "float, int8 and fp8 caches",
            "position bias on the CPU",
        ),
        benchmarks=_paged_benchmarks,
        peer=_paged_peer,
        bytes=_paged_bytes,
    )
)  # fmt: skip
