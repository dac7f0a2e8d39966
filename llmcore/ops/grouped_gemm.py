"""One matrix product per expert, over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import OpSpec, Sample, register, register_fake, use_kernel


def grouped_gemm(x_sorted: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x_sorted[r] for every row r of expert e, offsets[e] <= r < offsets[e + 1].

    Sums are in float32. Gradients reach x_sorted and weight; the weight gradient of an expert without rows is 0.

    Args:
        x_sorted: (rows, k), float32, bfloat16 or float16 (float64 through the reference), as from `moe_dispatch`.
        weight: (num_experts, n, k), x_sorted's dtype: one `torch.nn.Linear` weight per expert.
        offsets: (num_experts + 1,) int32, from 0 to rows.

    Returns:
        (rows, n) in x_sorted's dtype.

    Raises:
        RuntimeError: naming the offset, when offsets fall or don't run from 0 to rows.
    """
    if not use_kernel("grouped_gemm", x_sorted):
        return reference.grouped_gemm(x_sorted, weight, offsets)
    return torch.ops.llmcore.grouped_gemm(x_sorted, weight, offsets)


@register_fake("grouped_gemm")
def _(x_sorted, weight, offsets):
    return x_sorted.new_empty(x_sorted.shape[0], weight.shape[1])


@register_fake("grouped_gemm_backward")
def _(dy, x_sorted, weight, offsets, need_dx, need_dweight):
    return (
        x_sorted.new_empty(x_sorted.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = torch.ops.llmcore.grouped_gemm_backward(dy, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None


torch.library.register_autograd("llmcore::grouped_gemm", _backward, setup_context=_save)


def _offsets(rows_per_expert: list[int], device: str) -> Tensor:
    return torch.tensor([0, *rows_per_expert]).cumsum(0).int().to(device)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def call(rows: list[int], n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return randn(sum(rows), k), randn(len(rows), n, k), _offsets(rows, device)

    for rows, n, k in (
        ([1], 1, 1),
        ([0, 1, 2, 3, 4, 5, 0], 9, 7),  # the direct path, its edge, and experts without rows
        ([4, 0, 3, 2, 1], 259, 111),
        ([6, 13, 31], 59, 40),
        ([250, 5, 1], 270, 33),
    ):
        yield Sample(f"{rows} n {n} k {k}", call(rows, n, k), {}, (0, 1))
    yield Sample("long sums", call([9, 2], 17, 600), {}, (0, 1))
    yield Sample("no rows", call([0, 0, 0], 8, 16), {}, (0, 1))
    x, weight, offsets = call([3, 7, 0, 12], 24, 32)
    yield Sample("strided rows", (randn(44, 50)[::2, 9:41], weight, offsets), {}, (0, 1))
    yield Sample("weight by columns", (x, randn(4, 32, 24).transpose(1, 2), offsets), {}, (0, 1))
    yield Sample("weight in a wider one", (x, randn(4, 30, 40)[:, 2:26, 5:37], offsets), {}, (0, 1))
    yield Sample("weight by odd strides", (x, randn(4, 24, 64)[:, :, ::2], offsets), {}, (0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    experts, n, k = 16, 1024, 1024
    weight = (torch.randn(experts, n, k, generator=make) * k**-0.5).to(device, dtype)
    for rows in (256, 2):
        x = torch.randn(experts * rows, k, generator=make).to(device, dtype)
        yield Sample(
            f"16 experts of {rows} rows, 1024x1024", (x, weight, _offsets([rows] * experts, device)), {}, (0, 1)
        )


def _peer(x_sorted: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    groups = x_sorted.split(offsets.diff().tolist())
    return torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(groups, weight)])


register(
    OpSpec(
        name="grouped_gemm",
        op=grouped_gemm,
        reference=reference.grouped_gemm,
        torch_ops=("grouped_gemm", "grouped_gemm_backward"),
        samples=_samples,
        features=("experts without rows", "direct path for 1 to 4 rows", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=lambda s: 2.0 * s.args[0].shape[0] * s.args[1].shape[1] * s.args[1].shape[2],
    )
)
