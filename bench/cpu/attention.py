"""Attention forward and backward beside torch's SDPA and, where the work is sparse, beside our own dense kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cpu import Row, assert_close, name_of
from llmcore.ops import BlockMask, attention

# The relative error of a call and its peer against each other: a few roundings of the dtype.
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
# (query heads, KV heads) by sequence length; at 8192 fewer, so that a call of the slowest peer stays below a second
HEADS = {"GQA": {512: (32, 8), 2048: (32, 8), 8192: (8, 2)}, "MHA": {512: (16, 16), 2048: (8, 8), 8192: (2, 2)}}
Operands = tuple[Tensor, Tensor, Tensor]


def _operands(batch: int, seq: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Operands:
    make = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, seq, h, dim, generator=make).to(dtype) for h in (heads, kv_heads, kv_heads))


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matrix product, softmax, matrix product; the queries of a KV head in one product."""
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    k, v = (t.transpose(1, 2) for t in (k, v))
    rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = ((rows * dim**-0.5) @ k.transpose(-1, -2)).unflatten(2, (-1, seq))
    later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    p = scores.masked_fill(later, -torch.inf).softmax(-1).flatten(2, 3)
    return (p @ v).unflatten(2, (-1, seq)).permute(0, 3, 1, 2, 4).reshape(batch, seq, heads, dim)


def _with_backward(function: Callable, operands: Operands) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_() for t in operands]
    seed = torch.randn(operands[0].shape, generator=torch.Generator().manual_seed(1)).to(operands[0].dtype)

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, seed))

    return call


def _forward(function: Callable, operands: Operands) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (function(*operands),)


def _check(calls: dict[str, Callable], limit: float) -> None:
    own = calls["llmcore"]()
    for name, call in calls.items():
        for what, got, want in zip(("out", "dq", "dk", "dv"), own, call()):
            assert_close(f"{what} against {name}", got, want, limit)


def _causal_rows() -> Iterator[Row]:
    """The dense shapes against torch: GQA and MHA, D 64 and 128."""
    for dtype in (torch.bfloat16, torch.float32):
        bf16 = dtype == torch.bfloat16
        for direction in ("forward", "forward+backward"):
            backward = direction != "forward"
            for seq in (512, 2048, 8192) if bf16 and not backward else (512, 2048):
                short = seq == 512
                for kind in ("GQA", "MHA"):
                    for dim in (64, 128):
                        heads, kv_heads = HEADS[kind][seq]
                        operands = _operands(1, seq, heads, kv_heads, dim, dtype)
                        peers = {"llmcore": _ours, "sdpa": _sdpa} | ({"naive": _naive} if short and backward else {})
                        wrap = _with_backward if backward else _forward
                        calls = {name: wrap(f, operands) for name, f in peers.items()}
                        if bf16 and not backward:
                            must, aim = (2.0, 3.5) if short else (1.6, 2.3)
                        elif bf16:
                            must, aim = (1.6, 3.0) if short else (1.4, 2.0)
                        else:
                            must, aim = (1.3, 2.0) if short else (1.1, 1.4)
                        share = (0.7 if bf16 else 0.95) if not backward else None
                        yield Row(
                            kernel="attention",
                            case=f"causal {kind} {heads}/{kv_heads} S {seq} D {dim}",
                            dtype=name_of(dtype),
                            direction=direction,
                            calls=calls,
                            check=lambda calls=calls, dtype=dtype: _check(calls, LIMIT[dtype]),
                            must={"sdpa": must} | ({"naive": 1.6 if bf16 else must} if "naive" in calls else {}),
                            aim={"sdpa": aim} | ({"naive": aim} if "naive" in calls else {}),
                            # a backward pass is 2.5 forward passes' worth of products
                            work=2 * heads * seq * seq * dim * (3.5 if backward else 1),
                            ceiling=f"gemm_{name_of(dtype)}_gflops",
                            aim_share=share,
                        )


def _proportional(
    case: str, dtype: torch.dtype, calls: dict[str, Callable], check: Callable, part: float, must: float, aim: float
) -> Row:
    """A call that does `part` of the work of "dense" must take no longer than part * must of its time."""
    return Row(
        kernel="attention",
        case=case,
        dtype=name_of(dtype),
        direction="forward",
        calls=calls,
        check=check,
        must={"dense": 1 / (part * must)},
        aim={"dense": 1 / (part * aim)},
        notes=lambda: {"part of dense's work": part},
    )


def _sparse_rows() -> Iterator[Row]:
    """A sliding window and a mask of random blocks against our own dense kernel."""
    seq, heads, kv_heads, dim, window = 4096, 8, 2, 128, 256
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = _operands(1, seq, heads, kv_heads, dim, dtype)
        position = torch.arange(seq)
        for name, options, seen, causal in (
            ("window 256", {"window": window}, position[:, None] - position[None] < window, True),
            *(
                (f"50 % of blocks of {size}", {"block_mask": _half_of_blocks(seq, size)}, None, False)
                for size in (64, 128)
            ),
        ):
            if seen is None:
                mask = options["block_mask"]
                seen = mask.mask[0, 0].repeat_interleave(mask.block_q, 0).repeat_interleave(mask.block_k, 1)
            if causal:
                seen = seen & (position[:, None] >= position[None])
            visible, everything = int(seen.sum()), (seq * (seq + 1) // 2 if causal else seq * seq)
            calls = {
                "llmcore": lambda q=q, k=k, v=v, options=options, causal=causal: attention(
                    q, k, v, causal=causal, **options
                ),
                "dense": lambda q=q, k=k, v=v, causal=causal: attention(q, k, v, causal=causal),
            }

            def check(own=calls["llmcore"], seen=seen, q=q, k=k, v=v, dtype=dtype) -> None:
                want = scaled_dot_product_attention(
                    *(t[:, :, :1].transpose(1, 2).float() for t in (q, k, v)), attn_mask=seen
                )
                assert_close("out", own()[:, :, :1].transpose(1, 2), want, LIMIT[dtype])

            yield _proportional(
                f"{name} GQA 8/2 S {seq} D {dim}", dtype, calls, check, visible / everything, 1.15, 1.05
            )


def _half_of_blocks(seq: int, size: int) -> BlockMask:
    """Half of the blocks of every row, at random."""
    order = torch.rand(1, 1, seq // size, seq // size, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return BlockMask(order < seq // size // 2, size, size)


def _packed_rows() -> Iterator[Row]:
    """64 documents of uneven length, packed, against the same ones padded to the longest."""
    heads, kv_heads, dim = 8, 2, 64
    lengths = torch.randint(16, 513, (64,), generator=torch.Generator().manual_seed(3))
    lengths[0] = 512
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()
    real = torch.arange(512)[None] < lengths[:, None]
    for dtype in (torch.bfloat16, torch.float32):
        padded = _operands(64, 512, heads, kv_heads, dim, dtype)
        packed = [t[real] for t in padded]
        calls = {
            "llmcore": lambda packed=packed: attention(*packed, causal=True, cu_seqlens_q=offsets),
            "dense": lambda padded=padded: attention(*padded, causal=True),
        }

        def check(calls=calls, dtype=dtype) -> None:
            assert_close("out", calls["llmcore"](), calls["dense"]()[real], LIMIT[dtype])

        part = float(lengths.sum()) / real.numel()
        yield _proportional(f"64 packed documents GQA 8/2 D {dim}", dtype, calls, check, part, 1.10, 1.03)


def rows() -> Iterator[Row]:
    yield from _causal_rows()
    yield from _sparse_rows()
    yield from _packed_rows()
