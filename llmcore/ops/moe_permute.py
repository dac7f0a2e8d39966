"""(token, slot) pairs sorted by expert; tokens to that order and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the (token, slot) pairs of a routing by expert: for experts that come from elsewhere, as `moe_route` has
    sorted its own.

    The sort is stable: within an expert, rows keep the order of (token, slot). Rows offsets[e] to offsets[e + 1] belong
    to expert e. A token may name an expert more than once.

    Args:
        experts: (tokens, top_k) int32.
        num_experts: one more than the largest id accepted.

    Returns:
        offsets (num_experts + 1,) int32; row_of (tokens, top_k) int32, the sorted row of each pair; token_of
        (tokens * top_k,) int32, the token of each sorted row: token_of[row_of[t, j]] = t.

    Raises:
        RuntimeError: naming the id, when an expert lies outside [0, num_experts). On a CUDA device nobody looks: there
            an id below 0 counts as 0, one above as num_experts - 1.
    """
    if not use_kernel("moe_sort", experts):
        return reference.moe_sort(experts, num_experts)
    return torch.ops.llmcore.moe_sort(experts, num_experts)


def moe_dispatch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies every token once per chosen expert, into rows sorted by expert.

    The sort is stable: within an expert, rows keep the order of (token, slot). Rows offsets[e] to offsets[e + 1] of
    x_sorted belong to expert e; row row_of[t, j] holds token t for its expert experts[t, j]. The gradient of x sums a
    token's rows in float32.

    Args:
        x: (tokens, dim), float32, bfloat16 or float16 (float64 through the reference).
        experts: (tokens, top_k) int32, as from `moe_route`.
        num_experts: one more than the largest id accepted.

    Returns:
        x_sorted (tokens * top_k, dim) in x's dtype, offsets (num_experts + 1,) int32, row_of (tokens, top_k) int32.

    Raises:
        RuntimeError: naming the id, when an expert lies outside [0, num_experts). On a CUDA device as in `moe_sort`.
    """
    if not use_kernel("moe_dispatch", x):
        return reference.moe_dispatch(x, experts, num_experts)
    return torch.ops.llmcore.moe_dispatch(x, experts, num_experts)


def moe_combine(y_sorted: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    """out[t] = sum_j weights[t, j] * y_sorted[row_of[t, j]], summed in float32: the way back from `moe_dispatch`.

    Gradients reach y_sorted and weights.

    Args:
        y_sorted: (tokens * top_k, dim), float32, bfloat16 or float16 (float64 through the reference).
        weights: (tokens, top_k) float32.
        row_of: (tokens, top_k) int32, a permutation of the rows, as from `moe_dispatch`.

    Returns:
        (tokens, dim) in y_sorted's dtype.

    Raises:
        RuntimeError: naming the row, when row_of is not a permutation of [0, tokens * top_k). On a CUDA device nobody
            looks.
    """
    if not use_kernel("moe_combine", y_sorted):
        return reference.moe_combine(y_sorted, weights, row_of)
    return torch.ops.llmcore.moe_combine(y_sorted, weights, row_of)


@register_fake("moe_sort")
def _(experts, num_experts):
    return experts.new_empty(num_experts + 1), experts.new_empty(experts.shape), experts.new_empty(experts.numel())


@register_fake("moe_dispatch")
def _(x, experts, num_experts):
    tokens, top_k = experts.shape
    return (
        x.new_empty(tokens * top_k, x.shape[1]),
        experts.new_empty(num_experts + 1),
        experts.new_empty(tokens, top_k),
    )


@register_fake("moe_dispatch_backward")
def _(dx_sorted, row_of):
    return dx_sorted.new_empty(row_of.shape[0], dx_sorted.shape[1])


@register_fake("moe_combine")
def _(y_sorted, weights, row_of):
    return y_sorted.new_empty(row_of.shape[0], y_sorted.shape[1])


@register_fake("moe_combine_backward")
def _(dout, y_sorted, weights, row_of):
    return y_sorted.new_empty(y_sorted.shape), weights.new_empty(weights.shape)


def _save_dispatch(ctx, inputs, output):
    _, offsets, row_of = output
    ctx.save_for_backward(row_of)
    ctx.mark_non_differentiable(offsets, row_of)
    ctx.set_materialize_grads(False)


def _backward_dispatch(ctx, dx_sorted, *_):
    if dx_sorted is None:
        return None, None, None
    (row_of,) = ctx.saved_tensors
    return torch.ops.llmcore.moe_dispatch_backward(dx_sorted, row_of), None, None


def _save_combine(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_combine(ctx, dout):
    dy_sorted, dweights = torch.ops.llmcore.moe_combine_backward(dout, *ctx.saved_tensors)
    return dy_sorted, dweights, None


torch.library.register_autograd("llmcore::moe_dispatch", _backward_dispatch, setup_context=_save_dispatch)
torch.library.register_autograd("llmcore::moe_combine", _backward_combine, setup_context=_save_combine)

_SHAPES = (  # tokens, top_k, experts, dim
    (1, 1, 1, 1),
    (3, 2, 4, 5),
    (33, 3, 7, 111),
    (64, 2, 200, 32),
    (300, 6, 16, 59),
)


def _experts(tokens: int, top_k: int, num_experts: int, make: torch.Generator) -> Tensor:
    return torch.rand(tokens, num_experts, generator=make).argsort(-1)[:, :top_k].int()


def _sort_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def call(tokens: int, top_k: int, experts: int) -> tuple[Tensor, int]:
        return torch.randint(experts, (tokens, top_k), generator=make).to(device, dtype), experts

    for tokens, top_k, experts in ((1, 1, 1), (3, 2, 4), (33, 3, 7), (97, 8, 128), (700, 6, 64), (40, 2, 512)):
        yield Sample(f"{tokens}x{top_k} of {experts}", call(tokens, top_k, experts))
    yield Sample("more experts than a CTA has threads", call(60, 3, 1500))
    ids, experts = call(41, 2, 5)
    yield Sample("all to one expert", (torch.full_like(ids, 3), experts))
    yield Sample("transposed", (ids.t().contiguous().t(), experts))
    yield Sample("no tokens", (ids[:0], experts))


def _dispatch_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    for tokens, top_k, experts, dim in _SHAPES:
        ids = _experts(tokens, top_k, experts, make).to(device)
        yield Sample(f"{tokens}x{dim} to {top_k} of {experts}", (x(tokens, dim), ids, experts), {}, (0,))
    one = torch.full((5, 2), 3, dtype=torch.int32, device=device)
    yield Sample("all to one expert", (x(5, 16), one, 8), {}, (0,))
    ids = _experts(12, 2, 5, make).to(device)
    yield Sample("strided", (x(24, 50)[::2, 3:43], ids.t().contiguous().t(), 5), {}, (0,))
    yield Sample("transposed", (x(40, 12).t(), ids, 5), {}, (0,))
    yield Sample("no tokens", (x(0, 16), ids[:0], 5), {}, (0,))


def _combine_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def y(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def rest(tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(tokens * top_k, generator=make).int().view(tokens, top_k)
        return torch.rand(tokens, top_k, generator=make).to(device), rows.to(device)

    for tokens, top_k, _, dim in _SHAPES:
        yield Sample(f"{tokens}x{top_k}x{dim}", (y(tokens * top_k, dim), *rest(tokens, top_k)), {}, (0, 1))
    yield Sample("strided", (y(48, 50)[::2, 3:43], *rest(12, 2)), {}, (0, 1))
    yield Sample("transposed", (y(40, 24).t(), *rest(12, 2)), {}, (0, 1))
    yield Sample("no tokens", (y(0, 16), *rest(0, 2)), {}, (0, 1))


def _dispatch_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1024, generator=make).to(device, dtype)
    yield Sample("4096x1024 to 2 of 16", (x, _experts(4096, 2, 16, make).to(device), 16), {}, (0,))


def _combine_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    y, weights = torch.randn(8192, 1024, generator=make), torch.rand(4096, 2, generator=make)
    rows = torch.randperm(8192, generator=make).int().view(4096, 2)
    yield Sample("4096x2x1024", (y.to(device, dtype), weights.to(device), rows.to(device)), {}, (0, 1))


def _dispatch_peer(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets, row_of, token_of = sort_by_torch(experts, num_experts)
    return x[token_of], offsets, row_of


def _combine_peer(y_sorted: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    return torch.einsum("tkd,tk->td", y_sorted[row_of], weights.to(y_sorted.dtype))


def _sort_benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    yield Sample("32768 tokens, top 8 of 128", (_experts(32768, 8, 128, make).to(device, dtype), 128))


def sort_by_torch(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_sort` as one would write it in torch, without waiting for a device: what the kernels are timed beside."""
    ids, order = experts.flatten().sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype), out_int32=True)
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=experts.device))
    return offsets, row_of.view(experts.shape).int(), (order // experts.shape[1]).int()


register(
    OpSpec(
        name="moe_sort",
        op=moe_sort,
        reference=reference.moe_sort,
        torch_ops=("moe_sort",),
        samples=_sort_samples,
        dtypes={"cpu": (torch.int32,), "cuda": (torch.int32,)},
        reference_dtypes=(torch.int32,),
        features=("stable order", "any number of experts"),
        benchmarks=_sort_benchmarks,
        peer=sort_by_torch,
        bytes=lambda s: s.args[0].numel() * 12,
    )
)
register(
    OpSpec(
        name="moe_dispatch",
        op=moe_dispatch,
        reference=reference.moe_dispatch,
        torch_ops=("moe_dispatch", "moe_dispatch_backward"),
        samples=_dispatch_samples,
        dtypes=CPU_AND_CUDA,
        features=("stable order", "backward"),
        benchmarks=_dispatch_benchmarks,
        peer=_dispatch_peer,
        bytes=lambda s: s.args[0].numel() * s.args[0].element_size() * (1 + s.args[1].shape[1]),
    )
)
register(
    OpSpec(
        name="moe_combine",
        op=moe_combine,
        reference=reference.moe_combine,
        torch_ops=("moe_combine", "moe_combine_backward"),
        samples=_combine_samples,
        dtypes=CPU_AND_CUDA,
        features=("float32 weights and sums", "backward"),
        benchmarks=_combine_benchmarks,
        peer=_combine_peer,
        bytes=lambda s: s.args[0].numel() * s.args[0].element_size() * (1 + 1 / max(1, s.args[2].shape[1])),
    )
)
