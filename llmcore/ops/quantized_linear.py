"""Products with weights that stay in GGUF's quantised block formats."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, refuse_gradient, register, register_fake, use_kernel
from llmcore.reference.quantized import FORMATS, format_named, quantize, rounded

__all__ = [
    "FORMATS",
    "format_named",
    "pack_quantized",
    "quantize",
    "quantized_embedding",
    "quantized_linear",
    "quantized_linear_",
]

# Rows of x up to which a GPU multiplies by the packed weight.
MAX_CUDA_ROWS = 32


def quantized_linear(x: Tensor, packed: Tensor, format: str, out_features: int, bias: Tensor | None = None) -> Tensor:
    """y = round(x) @ W.T + bias for a quantised W, where round() makes int8 of x.

    x is rounded as part of the definition, so that products are summed as integers: each 32 adjacent elements share a
    float32 scale, their largest magnitude / 127, and become the nearest multiples of it (halves to even) by float32
    arithmetic. 32 elements whose magnitudes are all below 2^-100 become zeros; an element that is not finite makes its
    row of y NaN. W is taken as its format says, unrounded; sums are in float32.

    On the CPU one kernel serves any number of rows; on a GPU up to 32, and for more the weight becomes numbers of x's
    dtype for torch's product. On the CPU a row's result depends neither on the rows beside it nor on the
    number of threads. There is no gradient: asking for x's is an error.

    Args:
        x: (..., k), float32, bfloat16 or float16 (float64 through the reference).
        packed: W as `pack_quantized` gives it, (bytes,) uint8.
        format: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k or q6_k. k is a multiple of 32, of q*_k of 256.
        out_features: the rows of W.
        bias: (out_features,), x's dtype.

    Returns:
        (..., out_features) in x's dtype.
    """
    if not use_kernel("quantized_linear", x):
        return reference.quantized_linear(x, packed, format, out_features, bias)
    if x.is_cuda and x.numel() > MAX_CUDA_ROWS * x.shape[-1]:
        return _dense(x, packed, format, out_features, bias)
    return torch.ops.llmcore.quantized_linear(x, packed, format, out_features, bias)


def quantized_linear_(y: Tensor, x: Tensor, packed: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    """`quantized_linear` into y, which it gives back: of a product whose weight has parts in several formats, each
    part writes its own columns.

    Args:
        y: (..., out_features), x's dtype, its last dimension contiguous and its rows at one distance from each other,
            such as y_of_all_parts[..., begin:end].
        x, packed, format, bias: as of `quantized_linear`. x may ask for no gradient here.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError("quantized_linear_ has no gradient")
    if not use_kernel("quantized_linear_", y):
        return reference.quantized_linear_(y, x, packed, format, bias)
    if x.is_cuda and x.numel() > MAX_CUDA_ROWS * x.shape[-1]:
        return y.copy_(_dense(x, packed, format, y.shape[-1], bias))
    torch.ops.llmcore.quantized_linear_(y, x, packed, format, bias)
    return y


def _dense(x: Tensor, packed: Tensor, format: str, n: int, bias: Tensor | None) -> Tensor:
    """Many rows on a GPU: the weight as numbers of x's dtype, for torch's product."""
    rows = torch.arange(n, device=x.device)
    weight = torch.ops.llmcore.quantized_embedding(rows, packed, format, n, x.shape[-1], x.dtype)
    return F.linear(rounded(x).to(x.dtype), weight, bias)


def pack_quantized(blocks: Tensor, format: str) -> Tensor:
    """Blocks as in a GGUF file -> the layout that the kernels read, which takes as much memory give or take 4 %.

    Args:
        blocks: (n, bytes of a row) uint8, the rows of a matrix (n, k), block after block.
        format: as of `quantized_linear`.

    Returns:
        (bytes,) uint8. `llmcore.reference.unpack_quantized` gives the blocks back.
    """
    if not use_kernel("pack_quantized", blocks):
        return reference.pack_quantized(blocks, format)
    return torch.ops.llmcore.pack_quantized(blocks, format)


def quantized_embedding(
    ids: Tensor, packed: Tensor, format: str, num_embeddings: int, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of a quantised W as numbers: a table that is also the output matrix lies in memory once.

    Args:
        ids: (...) int32 or int64, 0 to num_embeddings - 1. On a GPU, which the host does not wait for, another id gives
            a row of NaN.
        packed, format: W, (num_embeddings, dim), as of `quantized_linear`.
        dtype: of the result; W's numbers are rounded to it once.

    Returns:
        (..., dim)
    """
    if not use_kernel("quantized_embedding", ids):
        return reference.quantized_embedding(ids, packed, format, num_embeddings, dim, dtype)
    return torch.ops.llmcore.quantized_embedding(ids, packed, format, num_embeddings, dim, dtype)


@register_fake("quantized_linear")
def _(x, packed, format, out_features, bias):
    return x.new_empty(*x.shape[:-1], out_features)


@register_fake("quantized_linear_")
def _(y, x, packed, format, bias):
    return None


@register_fake("pack_quantized")
def _(blocks, format):
    f = format_named(format)
    n, k = blocks.shape[0], blocks.shape[1] // f.bytes * f.block
    return blocks.new_empty(f.packed_bytes(n, k))


@register_fake("quantized_embedding")
def _(ids, packed, format, num_embeddings, dim, dtype):
    return ids.new_empty(*ids.shape, dim, dtype=dtype)


refuse_gradient("quantized_linear")
torch.library.impl("llmcore::pack_quantized", "CUDA", reference.pack_quantized)  # once for a weight


def _blocks(format: str, n: int, k: int, make: torch.Generator, device: str) -> Tensor:
    weight = torch.randn(n, k, generator=make) * torch.logspace(-1, 1, n).unsqueeze(1)
    return reference.quantize(weight, format).to(device)


# (shape of x without k, n), of which one fits every tile of rows and panels, and the others do not
_SHAPES = (((1,), 16), ((), 1), ((2, 1, 3), 21), ((7,), 40), ((13,), 33), ((2, 19), 5))


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def call(format: str, shape: tuple[int, ...], n: int, k: int) -> tuple:
        packed = reference.pack_quantized(_blocks(format, n, k, make, device), format)
        return randn(*shape, k), packed, format, n, randn(n)

    for name, f in FORMATS.items():
        for i, (shape, n) in enumerate(_SHAPES):
            args = call(name, shape, n, f.block * (1 + i % 3))
            # A single output that its bias nearly cancels is smaller than what its sum may be rounded by.
            yield Sample(f"{name} {shape} n {n}", args if n > 1 else args[:4])
    yield Sample("long sums", call("q4_1", (3,), 20, 4096))
    yield Sample("no bias", call("q8_0", (5,), 20, 96)[:4])
    yield Sample("no rows", call("q4_0", (0,), 20, 64))
    yield Sample("no columns", call("q4_0", (3,), 0, 64))
    yield Sample("empty sums", call("q5_1", (3,), 20, 0))
    x, *rest = call("q5_0", (6,), 20, 64)
    yield Sample("strided rows", (randn(12, 90)[::2, 9:73], *rest))
    yield Sample("x by columns", (randn(64, 6).t(), *rest))
    yield Sample("strided bias", (x, *rest[:3], randn(40)[::2]))
    wide = torch.full_like(randn(6, 90), torch.nan)
    wide[:, 3:67] = x
    yield Sample("between NaN", (wide[:, 3:67], *rest), poison=True)
    small = randn(4, 64)
    small[0], small[1, :32], small[2] = 0, 0, small[2] * 1e-30
    yield Sample("zeros and small numbers", (small, *rest))


def _part_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Calls of `_into_columns`."""
    for sample in _samples(dtype, device):
        x, packed, format, n, *bias = sample.args
        for wide in (0, 3):
            y = torch.full((*x.shape[:-1], n + 2 * wide), 7.0, dtype=dtype, device=device)
            yield Sample(f"{sample.label} of {n + 2 * wide}", (y, x, packed, format, wide, *bias))


def _into_columns(function):
    """`function` on columns of a copy of y; gives all of it, so that the other columns are compared too."""

    def call(y: Tensor, x: Tensor, packed: Tensor, format: str, wide: int, bias: Tensor | None = None) -> Tensor:
        y = y.clone()
        function(y[..., wide : y.shape[-1] - wide], x, packed, format, bias)
        return y

    return call


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    for format in ("q4_0", "q8_0", "q4_k"):
        packed = reference.pack_quantized(_blocks(format, 4096, 4096, make, device), format)
        for rows in (1, 512):
            x = torch.randn(rows, 4096, generator=make).to(device, dtype)
            yield Sample(f"{format}, {rows} rows, 4096 x 4096", (x, packed, format, 4096))


register(
    OpSpec(
        name="quantized_linear",
        op=quantized_linear,
        reference=reference.quantized_linear,
        torch_ops=("quantized_linear",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k", "int8 activations", "no gradient"),
        benchmarks=_benchmarks,
        flops=lambda s: 2.0 * s.args[0].numel() * s.args[3],
        bytes=lambda s: s.args[1].nbytes,
    )
)


register(
    OpSpec(
        name="quantized_linear_",
        op=_into_columns(quantized_linear_),
        reference=_into_columns(reference.quantized_linear_),
        torch_ops=("quantized_linear_",),
        samples=_part_samples,
        dtypes=CPU_AND_CUDA,
        features=("into columns of a wider result",),
    )
)


def _pack_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    for name, f in FORMATS.items():
        for n in (1, 16, 35):
            blocks = torch.randint(0, 256, (n, 3 * f.bytes), dtype=torch.uint8, generator=make).to(device)
            yield Sample(f"{name} n {n}", (blocks, name))
    yield Sample("no rows", (blocks[:0], name))
    yield Sample("no columns", (blocks[:, :0], name))
    yield Sample("strided", (blocks[::2], name))


register(
    OpSpec(
        name="pack_quantized",
        op=pack_quantized,
        reference=reference.pack_quantized,
        torch_ops=("pack_quantized",),
        samples=_pack_samples,
        dtypes={"cpu": (torch.uint8,), "cuda": (torch.uint8,)},
        reference_dtypes=(torch.uint8,),
        features=("once, when weights are loaded",),
    )
)


def _embedding_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    for name, f in FORMATS.items():
        for out in (torch.float32, torch.bfloat16, torch.float16):
            n, k = 37, 2 * f.block
            packed = reference.pack_quantized(_blocks(name, n, k, make, device), name)
            ids = torch.randint(0, n, (3, 5), generator=make).to(device, dtype)
            yield Sample(f"{name} {str(out).removeprefix('torch.')}", (ids, packed, name, n, k, out))
    yield Sample("no ids", (ids[:0], packed, name, n, k))
    yield Sample("strided ids", (ids[:, ::2], packed, name, n, k))


register(
    OpSpec(
        name="quantized_embedding",
        op=quantized_embedding,
        reference=reference.quantized_embedding,
        torch_ops=("quantized_embedding",),
        samples=_embedding_samples,
        dtypes={"cpu": (torch.int64, torch.int32), "cuda": (torch.int64, torch.int32)},
        reference_dtypes=(torch.int64, torch.int32),
        features=("a table that is also the output matrix",),
    )
)
