"""One matrix product per expert, over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import FLOATS, HALVES, OpSpec, Sample, register, register_fake, use_kernel

DTYPES = {"cpu": FLOATS, "cuda": HALVES}  # tensor cores have no float32 products


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, token_of: Tensor | None = None, row_of: Tensor | None = None
) -> Tensor:
    """y[r] = weight[e] @ x[r] for every row r of expert e, offsets[e] <= r < offsets[e + 1].

    With token_of, row r reads x[token_of[r]]: the rows of tokens that go to several experts need not be copied into
    order first. Sums are in float32. Gradients reach x and weight; the gradient of a token is the float32 sum of its
    rows' in the order of row_of, that of the weight of an expert without rows is 0.

    Args:
        x: (rows, k), float32, bfloat16 or float16 (float64 through the reference; on CUDA float32, too), as from
            `moe_dispatch`; with token_of (tokens, k).
        weight: (num_experts, n, k), x's dtype: one `torch.nn.Linear` weight per expert.
        offsets: (num_experts + 1,) int32, from 0 to rows.
        token_of: (rows,) int32, the token of every sorted row; with row_of.
        row_of: (tokens, top_k) int32, the rows of every token: token_of[row_of[t, j]] == t. With token_of.

    Returns:
        (rows, n) in x's dtype.

    Raises:
        RuntimeError: naming the offset, when offsets fall or don't run from 0 to rows; naming the row, when row_of is
            not a permutation of the rows or token_of says otherwise. (On the CPU: on CUDA the values are the caller's
            word.)
    """
    if not use_kernel("grouped_gemm", x):
        return reference.grouped_gemm(x, weight, offsets, token_of=token_of, row_of=row_of)
    return torch.ops.llmcore.grouped_gemm(x, weight, offsets, token_of, row_of)


@register_fake("grouped_gemm")
def _(x, weight, offsets, token_of, row_of):
    return x.new_empty((x if token_of is None else token_of).shape[0], weight.shape[1])


@register_fake("grouped_gemm_backward")
def _(dy, x, weight, offsets, token_of, row_of, need_dx, need_dweight):
    return (
        x.new_empty(x.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = torch.ops.llmcore.grouped_gemm_backward(dy, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None, None, None


torch.library.register_autograd("llmcore::grouped_gemm", _backward, setup_context=_save)


def offsets_of(rows_per_expert: list[int], device: str) -> Tensor:
    return torch.tensor([0, *rows_per_expert]).cumsum(0).int().to(device)


def assignments(rows_per_expert: list[int], top_k: int, make: torch.Generator, device: str) -> dict[str, Tensor]:
    """token_of and row_of of tokens that went to the rows at random, some of them twice to an expert."""
    row_of = torch.randperm(sum(rows_per_expert), generator=make).view(-1, top_k)
    token_of = row_of.flatten().argsort() // top_k
    return {"token_of": token_of.int().to(device), "row_of": row_of.int().to(device)}


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def call(rows: list[int], n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return randn(sum(rows), k), randn(len(rows), n, k), offsets_of(rows, device)

    for rows, n, k in (
        ([1], 1, 1),
        ([0, 1, 2, 3, 4, 5, 0], 9, 7),  # experts without rows
        ([4, 0, 3, 2, 1], 259, 111),
        ([6, 13, 31], 59, 40),
        ([250, 5, 1], 270, 33),
        ([8, 9, 17, 33], 40, 72),  # beside the edges between the paths for few rows and for many
        ([32, 7], 70, 420),
        ([0, 0, 150, 0], 72, 136),
        ([1] * 35, 24, 72),
    ):
        yield Sample(f"{rows} n {n} k {k}", call(rows, n, k), {}, (0, 1))
    yield Sample("long sums", call([9, 2], 17, 600), {}, (0, 1))
    yield Sample("no rows", call([0, 0, 0], 8, 16), {}, (0, 1))
    x, weight, offsets = call([3, 7, 0, 12], 24, 32)
    yield Sample("strided rows", (randn(44, 50)[::2, 9:41], weight, offsets), {}, (0, 1))
    yield Sample("weight by columns", (x, randn(4, 32, 24).transpose(1, 2), offsets), {}, (0, 1))
    yield Sample("weight in a wider one", (x, randn(4, 30, 40)[:, 2:26, 5:37], offsets), {}, (0, 1))
    yield Sample("weight by odd strides", (x, randn(4, 24, 64)[:, :, ::2], offsets), {}, (0, 1))
    for rows, top_k, n, k in (([3, 7, 0, 12], 2, 24, 32), ([0, 129, 30], 3, 40, 71), ([2, 0, 0], 1, 5, 9)):
        x, weight, offsets = call(rows, n, k)
        tokens = sum(rows) // top_k
        kwargs = assignments(rows, top_k, make, device)
        yield Sample(f"gathered, top {top_k} of {rows}", (x[:tokens].clone(), weight, offsets), kwargs, (0, 1))
    x, weight, offsets = call([0, 0], 8, 16)
    yield Sample("gathered, no tokens", (x, weight, offsets), assignments([0], 2, make, device), (0, 1))
    # what stands between the rows and beside the weights may not be read
    x, weight, offsets = call([20, 2, 0, 2], 30, 40)
    wide_x, wide_weight = torch.full_like(randn(24, 60), torch.nan), torch.full_like(randn(4, 33, 50), torch.nan)
    wide_x[:, 3:43], wide_weight[:, 1:31, 8:48] = x, weight
    poisoned = (wide_x[:, 3:43], wide_weight[:, 1:31, 8:48], offsets)
    yield Sample("between NaN", poisoned, {}, (0, 1), poison=True)
    kwargs = assignments([20, 2, 0, 2], 2, make, device)
    yield Sample("gathered, between NaN", (wide_x[:12, 3:43], *poisoned[1:]), kwargs, (0, 1), poison=True)


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    experts, n, k = 16, 1024, 1024
    weight = (torch.randn(experts, n, k, generator=make) * k**-0.5).to(device, dtype)
    for rows in (256, 2):
        x = torch.randn(experts * rows, k, generator=make).to(device, dtype)
        yield Sample(
            f"16 experts of {rows} rows, 1024x1024", (x, weight, offsets_of([rows] * experts, device)), {}, (0, 1)
        )


def _peer(x: Tensor, weight: Tensor, offsets: Tensor, *, token_of: Tensor | None = None, **_) -> Tensor:
    x = x if token_of is None else x[token_of]
    if x.is_cuda:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
    groups = x.split(offsets.diff().tolist())
    return torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(groups, weight)])


def bytes_moved(sample: Sample, outputs: int) -> float:
    """Of a call with that many columns of results: rows read, weights of experts with rows, rows written."""
    x, weight, offsets = sample.args
    used, rows = int((offsets.diff() > 0).sum()), int(offsets[-1])
    return x.element_size() * (x.numel() + used * weight[0].numel() + rows * outputs)


register(
    OpSpec(
        name="grouped_gemm",
        op=grouped_gemm,
        reference=reference.grouped_gemm,
        torch_ops=("grouped_gemm", "grouped_gemm_backward"),
        samples=_samples,
        dtypes=DTYPES,
        features=("experts without rows", "gathered rows", "paths for few rows per expert", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=lambda s: 2.0 * int(s.args[2][-1]) * s.args[1].shape[1] * s.args[1].shape[2],
        bytes=lambda s: bytes_moved(s, s.args[1].shape[1]),
    )
)
