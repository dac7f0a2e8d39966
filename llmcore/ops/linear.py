"""A linear layer. Few rows on the CPU, as in decoding, have a kernel; more take the product of `grouped_gemm` where
torch's is slower; all else is torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore import _C, reference
from llmcore.ops.grouped_gemm import grouped_gemm
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel

# Rows of x up to which the kernel takes the call. At 32 rows of bfloat16 it is 1.25 to 1.65 times as fast as torch
# where the weight (4096 x 4096) comes from memory, and as fast where it lies in a cache; beyond, packing the weight
# pays. As kLinearRows in csrc/include/llmcore/linear.h.
MAX_ROWS = 32


def _rows_of_ours(isa: str, traits: dict[str, bool]) -> dict[torch.dtype, float]:
    """By dtype, the rows up to which our product of more than MAX_ROWS rows is the faster one (docs/cpu-linear.md)."""
    if not isa.startswith("avx"):
        return {}
    # Torch's library of float32 products keeps to AVX2 on processors that are not Intel's, at half the rate.
    float32 = math.inf if isa.startswith("avx512") and not traits["intel"] else 0
    # Without instructions for them, torch's products of 16-bit floats run at a third of float32's rate or less; ours
    # widen while packing, and run at float32's. With them, torch's large products are as fast as ours.
    bfloat16 = math.inf
    if traits["amx_bf16"]:
        bfloat16 = 0
    elif isa.startswith("avx512bf16"):
        bfloat16 = 128
    return {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: 0 if traits["avx512_fp16"] else math.inf}


# of the instruction set that is active when llmcore is imported, as torch.compile can't ask for it later
_ROWS = _rows_of_ours(_C.active_cpu_isa(), _C.cpu_traits())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, as `torch.nn.functional.linear`.

    On the CPU, up to 32 rows of x for which no gradient is asked are multiplied by a kernel that is bound by the memory
    that holds the weight, which it reads as it lies: nothing is packed or kept between calls. A row's result does not
    depend on the rows beside it. Other calls are `grouped_gemm`'s of one expert where that is faster than torch, which
    depends on processor and dtype; it cannot be differentiated twice. Every other call is torch's.

    Args:
        x: (..., k), float32, bfloat16 or float16 (float64 through the reference).
        weight: (n, k), x's dtype; k should be contiguous, else the kernel copies it first.
        bias: (n,), x's dtype.

    Returns:
        (..., n) in x's dtype.
    """
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    gradient = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    k = weight.shape[-1]
    few = x.numel() <= MAX_ROWS * k if k else x.shape[:-1].numel() <= MAX_ROWS
    if few and not gradient:
        return _kernel(x, weight, bias) if use_kernel("linear", x) else reference.linear(x, weight, bias)
    most = _ROWS.get(x.dtype, 0)
    if gradient and most < math.inf:  # limits are those of the product alone
        most = 0
    if x.numel() > most * k or weight.ndim != 2 or x.ndim < 2 or 0 in weight.shape:
        return F.linear(x, weight, bias)
    if not use_kernel("grouped_gemm", x):
        return reference.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    offsets = torch.tensor([0, rows.shape[0]], dtype=torch.int32)
    y = grouped_gemm(rows, weight[None], offsets).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


_kernel = torch.ops.llmcore.linear.default


@register_fake("linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.impl("llmcore::linear", "CUDA", F.linear)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def call(shape: tuple[int, ...], n: int) -> tuple[Tensor, Tensor, Tensor]:
        return randn(*shape), randn(n, shape[-1]), randn(n)

    for shape, n in (
        ((1,), 1),
        ((1, 7), 9),
        ((2, 32), 16),
        ((3, 65), 21),
        ((4, 128), 40),
        ((2, 1, 3, 111), 33),
        ((7, 259), 12),
        ((8, 64), 8),
        ((1, 13, 96), 130),
        ((2, 2, 5, 40), 17),
        ((31, 33), 11),
        ((32, 600), 19),  # several blocks of k
    ):
        yield Sample(f"{shape} n {n}", call(shape, n))
    x, weight, bias = call((5, 1300), 6)
    yield Sample("no bias", (x, weight))
    yield Sample("long sums", call((1, 5000), 3))
    yield Sample("no rows", (randn(0, 8), randn(4, 8), randn(4)))
    yield Sample("no columns", (randn(3, 8), randn(0, 8)))
    yield Sample("empty sums", (randn(3, 0), randn(5, 0), randn(5)))
    x, weight, bias = call((6, 70), 20)
    yield Sample("strided rows", (randn(12, 90)[::2, 9:79], weight, bias))
    yield Sample("x by columns", (randn(70, 6).t(), weight, bias))
    yield Sample("weight by columns", (x, randn(70, 20).t(), bias))
    yield Sample("strided bias", (x, weight, randn(40)[::2]))
    wide_x, wide_weight = torch.full_like(randn(6, 90), torch.nan), torch.full_like(randn(20, 100), torch.nan)
    wide_x[:, 3:73], wide_weight[:, 8:78] = x, weight
    yield Sample("between NaN", (wide_x[:, 3:73], wide_weight[:, 8:78], bias), poison=True)


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    weight = (torch.randn(4096, 4096, generator=make) / 64).to(device, dtype)
    for rows in (1, 16):
        yield Sample(f"{rows} rows, 4096 x 4096", (torch.randn(rows, 4096, generator=make).to(device, dtype), weight))


register(
    OpSpec(
        name="linear",
        op=linear,
        reference=reference.linear,
        torch_ops=("linear",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=(
            "up to 32 rows on the CPU, without a gradient",
            "more by grouped_gemm where torch is slower",
            "all else is torch's product, on CUDA too",
        ),
        benchmarks=_benchmarks,
        peer=F.linear,
        flops=lambda s: 2.0 * s.args[0].numel() * s.args[1].shape[0],
        bytes=lambda s: s.args[1].nbytes,
    )
)
