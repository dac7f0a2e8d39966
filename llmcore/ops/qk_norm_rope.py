"""From a fused projection to attention in one pass: QK-norm, rotary embedding and, for generation, the cache write."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops import qk_norm_rope_cuda  # noqa: F401  registers the ops' CUDA side
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel
from llmcore.ops.rope import rope_tables


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
    """Queries, keys and values for `attention` out of a fused projection: q and k through `rms_norm` over head_dim
    where they have a weight, then through `rope` where there are tables; v as it is.

    On the CPU this is one pass over memory each way: the backward pass gives the gradient of all of qkv at once.
    Computed in float32 and rounded once. v is a copy, so that the outputs do not keep qkv alive.

    Args:
        qkv: (batch, seq, features) or packed (total, features), float32, bfloat16 or float16 (float64 through the
            reference). A row holds num_heads query heads, num_kv_heads key heads and as many value heads, each of
            head_dim = features / (num_heads + 2 num_kv_heads) elements.
        cos, sin, positions, interleaved: as in `rope`, positions (batch, seq) or (total,); without tables nothing is
            rotated.
        q_weight, k_weight: (head_dim,), qkv's dtype, or None for no norm (arXiv 2302.05442).
        eps: of both norms.

    Returns:
        (q, k, v), (batch, seq, heads, head_dim) or (total, heads, head_dim), contiguous.

    Raises:
        RuntimeError: a position outside the table, by value and token; a shape, dtype or device that does not fit.
    """
    if not use_kernel("qk_norm_rope", qkv):
        return reference.qk_norm_rope(
            qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved=interleaved
        )
    return torch.ops.llmcore.qk_norm_rope(
        qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved
    )


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
    """`qk_norm_rope` for generation: k and v go to a paged cache as by `kv_cache_write`, only q is returned.

    On the CPU one pass, in which keys are rounded once, to the cache's dtype. Not differentiable.

    Args:
        qkv: (tokens, features), as in `qk_norm_rope`.
        k_cache, v_cache, slot_mapping, k_scale, v_scale: as in `kv_cache_write`. Tokens of slot -1 get their q.
        the others: as in `qk_norm_rope`.

    Returns:
        q, (tokens, num_heads, head_dim), contiguous.

    Raises:
        RuntimeError: as `qk_norm_rope` and `kv_cache_write`. Nothing has been written then.
    """
    tables = (cos, sin, positions, q_weight, k_weight, eps)
    if not use_kernel("qk_norm_rope_cache_write", qkv):
        return reference.qk_norm_rope_cache_write(
            qkv, num_heads, num_kv_heads, k_cache, v_cache, slot_mapping, *tables, interleaved=interleaved,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    call = (qkv, num_heads, num_kv_heads, k_cache, v_cache, slot_mapping, *tables, interleaved, k_scale, v_scale)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _WithoutGradient.apply(*call)
    return torch.ops.llmcore.qk_norm_rope_cache_write(*call)


class _WithoutGradient(torch.autograd.Function):
    """Torch takes no autograd formula of an op that mutates, not even one that refuses."""

    @staticmethod
    def forward(ctx, *call):
        return torch.ops.llmcore.qk_norm_rope_cache_write(*call)

    @staticmethod
    def backward(ctx, dq):
        raise NotImplementedError("qk_norm_rope_cache_write has no gradient; train with qk_norm_rope, without a cache")


def _new_heads(qkv: Tensor, heads: int, num_heads: int, num_kv_heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], heads, qkv.shape[-1] // (num_heads + 2 * num_kv_heads))


@register_fake("qk_norm_rope")
def _(qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved):
    return tuple(_new_heads(qkv, n, num_heads, num_kv_heads) for n in (num_heads, num_kv_heads, num_kv_heads))


@register_fake("qk_norm_rope_cache_write")
def _(qkv, num_heads, num_kv_heads, *rest):
    return _new_heads(qkv, num_heads, num_heads, num_kv_heads)


@register_fake("qk_norm_rope_backward")
def _(dq, dk, dv, qkv, num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved):
    like = next(d for d in (dq, dk, dv) if d is not None)
    dqkv = like.new_empty(*like.shape[:-2], (num_heads + 2 * num_kv_heads) * like.shape[-1])
    return dqkv, *(like.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight))


def _save(ctx, inputs, output):
    qkv, *ctx.heads, cos, sin, positions, q_weight, k_weight, ctx.eps, ctx.interleaved = inputs
    normed = q_weight is not None or k_weight is not None
    ctx.save_for_backward(qkv if normed else None, cos, sin, positions, q_weight, k_weight)
    ctx.set_materialize_grads(False)


def _backward(ctx, dq, dk, dv):
    qkv, *tables = ctx.saved_tensors
    dqkv, dq_weight, dk_weight = torch.ops.llmcore.qk_norm_rope_backward(
        dq, dk, dv, qkv, *ctx.heads, *tables, ctx.eps, ctx.interleaved
    )
    q_weight, k_weight = tables[3:]
    weights = (None if w is None else dw for w, dw in ((q_weight, dq_weight), (k_weight, dk_weight)))
    return dqkv, None, None, None, None, None, *weights, None, None


torch.library.register_autograd("llmcore::qk_norm_rope", _backward, setup_context=_save)


def _calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, dict]]:
    """Label, (qkv, num_heads, num_kv_heads) and the rest by name. The first calls are packed."""
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def tables(rotary_dim: int, *tokens: int, length: int = 50, positions_dtype: torch.dtype = torch.int64) -> dict:
        cos, sin = rope_tables(length, rotary_dim, device=device)
        positions = torch.randint(length, tokens, generator=make, dtype=positions_dtype).to(device) if tokens else None
        return {"cos": cos, "sin": sin, "positions": positions}

    def weights(dim: int) -> dict:
        return {"q_weight": randn(dim), "k_weight": randn(dim)}

    for pairing, interleaved in (("halves", False), ("pairs", True)):
        turn = {"interleaved": interleaved}
        yield f"{pairing}: norms", (randn(5, 8 * 16), 4, 2), {**tables(16, 5), **weights(16), **turn}
        yield f"{pairing}: no norms", (randn(5, 8 * 16), 4, 2), {**tables(16, 5), **turn}
        yield f"{pairing}: odd head size", (randn(3, 4 * 59), 2, 1), {**tables(36, 3), **weights(59), **turn}
        yield f"{pairing}: long heads", (randn(2, 3 * 128), 1, 1), {**tables(128, 2), **weights(128), **turn}
    yield "no rotation", (randn(4, 8 * 20), 4, 2), weights(20)
    yield "neither", (randn(4, 8 * 20), 4, 2), {}
    yield "norm of queries only", (randn(4, 6 * 24), 2, 2), {**tables(24), "q_weight": randn(24)}
    yield "norm of keys only", (randn(4, 6 * 24), 2, 2), {**tables(24), "k_weight": randn(24), "eps": 0.1}
    yield "many tokens", (randn(70, 10 * 8), 6, 2), {**tables(8, 70, positions_dtype=torch.int32), **weights(8)}
    yield "one head each", (randn(67, 3 * 6), 1, 1), {**tables(4, 67), **weights(6)}
    yield "columns of a wider tensor", (randn(6, 3, 200)[:, 1, 7:107], 3, 1), {**tables(20, 6), **weights(20)}
    yield "transposed", (randn(64, 5).t(), 2, 1), {**tables(16), **weights(16)}
    yield "large values", (randn(4, 4 * 32) * 1e3, 2, 1), {**tables(32, 4), **weights(32)}
    yield "no tokens", (randn(0, 4 * 8), 2, 1), {**tables(8, 0), **weights(8)}


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for label, args, kwargs in _calls(dtype, device):
        given = tuple(name for name in ("q_weight", "k_weight") if name in kwargs)
        yield Sample(label, args, kwargs, differentiable=(0, *given))
    make = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 5, 8 * 16, generator=make).to(device, dtype), torch.ones(16).to(device, dtype)
    cos, sin = rope_tables(9, 16, device=device)
    positions = torch.tensor([[1, 7, 3, 1, 5], [2, 3, 5, 6, 7]], device=device)
    yield Sample("batch", (x, 4, 2, cos, sin, positions, weight, weight * 2), differentiable=(0, 6, 7))
    yield Sample("batch without positions", (x, 4, 2, cos, sin), differentiable=(0,))
    poisoned = [table.index_fill(0, torch.tensor([0, 4, 8], device=device), torch.nan) for table in (cos, sin)]
    yield Sample("unused rows of the tables are NaN", (x, 4, 2, *poisoned, positions), differentiable=(0,), poison=True)


def _cache_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(2)
    cache_dtypes = (dtype, *reference.LARGEST_ELEMENT)
    for call, (label, args, kwargs) in enumerate(_calls(dtype, device)):
        tokens, (heads, kv_heads) = args[0].shape[0], args[1:]
        dim = args[0].shape[1] // (heads + 2 * kv_heads)
        mapping = torch.randperm(5 * 16, generator=make)[:tokens].to(device)
        if tokens > 3:
            mapping[2] = -1
        for cache_dtype in cache_dtypes[call % 2 : call % 2 + 1] if call > 3 else cache_dtypes:
            caches = [torch.full((5, 16, kv_heads, dim), 1, dtype=cache_dtype, device=device) for _ in range(2)]
            scales = {}
            if cache_dtype in reference.LARGEST_ELEMENT:
                scales = {name: torch.full((5, 16, kv_heads), 0.5, device=device) for name in ("k_scale", "v_scale")}
            name = str(cache_dtype).removeprefix("torch.")
            yield Sample(f"{name}: {label}", (*args, *caches, mapping), kwargs | scales)


def _on_copies(function):
    """The op on copies of the caches (a sample is used more than once). Returns q and what the caches stand for: at a
    tie, the last bit of q and k decides how an element of 8 bits is rounded."""

    def run(qkv, num_heads, num_kv_heads, k_cache, v_cache, slot_mapping, *args, k_scale=None, v_scale=None, **kwargs):
        k_cache, v_cache, k_scale, v_scale = (
            t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            for t in (k_cache, v_cache, k_scale, v_scale)
        )
        q = function(
            qkv, num_heads, num_kv_heads, k_cache, v_cache, slot_mapping, *args, k_scale=k_scale, v_scale=v_scale,
            **kwargs,
        )  # fmt: skip
        if k_scale is None:
            return q, k_cache, v_cache
        return q, k_cache.float() * k_scale.unsqueeze(-1), v_cache.float() * v_scale.unsqueeze(-1)

    run.in_place = function
    return run


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    qkv, weight = torch.randn(4, 512, 16 * 64).to(device, dtype), torch.ones(64).to(device, dtype)
    args = (qkv, 8, 4, *rope_tables(512, 64, device=device), None, weight, weight.clone())
    yield Sample("4x512, 8/4 heads of 64, norms", args, differentiable=(0, 6, 7))
    yield Sample("4x512, 8/4 heads of 64", args[:5], differentiable=(0,))


def _cache_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    qkv, weight = torch.randn(64, 48 * 128).to(device, dtype), torch.ones(128).to(device, dtype)
    k_cache, v_cache = torch.zeros(2, 512, 16, 8, 128).to(device, dtype)
    positions, slots = torch.arange(64, device=device) * 7, torch.arange(64, device=device) * 16
    args = (qkv, 32, 8, k_cache, v_cache, slots, *rope_tables(512, 128, device=device), positions)
    yield Sample("64 tokens, 32/8 heads of 128, norms", (*args, weight, weight.clone()))


def _bytes(sample: Sample) -> float:
    return 2 * sample.args[0].numel() * sample.args[0].element_size()


_FEATURES = ("QK-norm and rotary embedding of a fused projection", "each optional", "partial and interleaved rotation")
register(
    OpSpec(
        name="qk_norm_rope",
        op=qk_norm_rope,
        reference=reference.qk_norm_rope,
        torch_ops=("qk_norm_rope", "qk_norm_rope_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=(*_FEATURES, "backward in one pass"),
        benchmarks=_benchmarks,
        bytes=_bytes,
    )
)
register(
    OpSpec(
        name="qk_norm_rope_cache_write",
        op=_on_copies(qk_norm_rope_cache_write),
        reference=_on_copies(reference.qk_norm_rope_cache_write),
        torch_ops=("qk_norm_rope_cache_write",),
        samples=_cache_samples,
        dtypes=CPU_AND_CUDA,
        features=(*_FEATURES, "into a paged cache of any dtype"),
        benchmarks=_cache_benchmarks,
        bytes=_bytes,
    )
)
