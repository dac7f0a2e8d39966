"""One product per expert with weights that stay in GGUF's quantised block formats, over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.grouped_gemm import assignments, grouped_gemm, offsets_of
from llmcore.ops.quantized_linear import MAX_CUDA_ROWS, pack_quantized
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, refuse_gradient, register, register_fake, use_kernel
from llmcore.reference.quantized import FORMATS, PANEL, format_named, rounded


def quantized_grouped_linear(
    x: Tensor,
    packed: Tensor,
    format: str,
    out_features: int,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y[r] = round(x[r]) @ W_e.T + bias[e] for every row r of expert e, offsets[e] <= r < offsets[e + 1], for quantised
    W_e; round() and the sums are those of `quantized_linear`.

    With token_of, row r reads x[token_of[r]]. On the CPU a row has the bits that `quantized_linear` gives it with its
    expert's weight, whatever the other rows and the number of threads. On a GPU a kernel serves up to 32 rows, those of
    all experts counted; for more, the weights of all experts become numbers of x's dtype for `grouped_gemm`. There is
    no gradient: asking for x's is an error.

    Args:
        x: (rows, k), with token_of (tokens, k); float32, bfloat16 or float16 (float64 through the reference).
        packed: the experts' weights as `pack_experts` gives them, (num_experts, bytes) uint8.
        format, out_features: of each expert's weight (out_features, k), as of `quantized_linear`.
        offsets: (num_experts + 1,) int32, from 0 to rows.
        token_of: (rows,) int32, the token of every sorted row.
        bias: (num_experts, out_features), x's dtype.

    Returns:
        (rows, out_features) in x's dtype.

    Raises:
        RuntimeError: naming the offset, when offsets fall or don't run from 0 to rows; naming the row, when there is no
            such token. (On the CPU: on CUDA the values are the caller's word.)
    """
    if not use_kernel("quantized_grouped_linear", x):
        return reference.quantized_grouped_linear(
            x, packed, format, out_features, offsets, token_of=token_of, bias=bias
        )
    rows = (x if token_of is None else token_of).shape[0]
    if x.is_cuda and rows > MAX_CUDA_ROWS:
        return _dense(x, packed, format, out_features, offsets, token_of, bias)
    return torch.ops.llmcore.quantized_grouped_linear(x, packed, format, out_features, offsets, token_of, bias)


def _dense(
    x: Tensor, packed: Tensor, format: str, n: int, offsets: Tensor, token_of: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Many rows on a GPU: the weights as numbers of x's dtype, for the grouped product."""
    num_experts, k = len(packed), x.shape[-1]
    padded = -(-n // PANEL) * PANEL  # the experts' panels, one below the other, are one matrix with this many rows each
    ids = torch.arange(num_experts * padded, device=x.device).view(num_experts, padded)[:, :n]
    weight = torch.ops.llmcore.quantized_embedding(ids, packed.flatten(), format, num_experts * padded, k, x.dtype)
    x = rounded(x).to(x.dtype)
    y = grouped_gemm(x if token_of is None else x[token_of.long()], weight, offsets)
    if bias is None:
        return y
    return y + bias[torch.repeat_interleave(offsets.diff(), output_size=len(y))]


def pack_experts(blocks: Tensor, format: str) -> Tensor:
    """Blocks of experts as in a GGUF file -> their packed weights, each as of `pack_quantized`.

    Args:
        blocks: (num_experts, n, bytes of a row) uint8.

    Returns:
        (num_experts, bytes) uint8.
    """
    num_experts, n, row_bytes = blocks.shape
    if n % PANEL == 0:  # no panel holds rows of two experts
        return pack_quantized(blocks.flatten(0, 1), format).view(num_experts, -1)
    f = format_named(format)
    packed = blocks.new_empty(num_experts, f.packed_bytes(n, row_bytes // f.bytes * f.block))
    for expert, to in zip(blocks, packed):
        to.copy_(pack_quantized(expert, format))
    return packed


@register_fake("quantized_grouped_linear")
def _(x, packed, format, out_features, offsets, token_of, bias):
    return x.new_empty((x if token_of is None else token_of).shape[0], out_features)


refuse_gradient("quantized_grouped_linear")


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def experts(format: str, num_experts: int, n: int, k: int) -> Tensor:
        """Packed weights of experts that differ in size, so that a row with another's shows."""
        weight = torch.randn(num_experts, n, k, generator=make) * torch.logspace(0, 1, num_experts).view(-1, 1, 1)
        blocks = reference.quantize(weight.flatten(0, 1), format).unflatten(0, (num_experts, n))
        return torch.stack([reference.pack_quantized(b, format) for b in blocks]).to(device)

    def call(format: str, rows: list[int], n: int, k: int) -> tuple[tuple, dict]:
        packed = experts(format, len(rows), n, k)
        return (randn(sum(rows), k), packed, format, n, offsets_of(rows, device)), {"bias": randn(len(rows), n)}

    for format, f in FORMATS.items():
        for rows, n in (([1], 16), ([0, 1, 2, 0, 5, 8, 0], 21), ([0, 19, 0], 40), ([1] * 12, 5)):
            yield Sample(f"{format} {rows} n {n}", *call(format, rows, n, f.block))
        args, kwargs = call(format, [3, 7, 0, 2], 33, 2 * f.block)
        args = (args[0][:6].clone(), *args[1:])
        kwargs["token_of"] = assignments([3, 7, 0, 2], 2, make, device)["token_of"]
        yield Sample(f"{format} gathered, top 2", args, kwargs)
    yield Sample("long sums", *call("q4_1", [3, 1], 20, 2048))
    yield Sample("more tasks than panels", *call("q8_0", [40, 1, 0, 1], 17, 64))
    args, kwargs = call("q5_0", [3, 0, 5], 20, 64)
    yield Sample("no bias", args)
    yield Sample("strided rows", (randn(16, 90)[::2, 9:73], *args[1:]), kwargs)
    yield Sample("strided bias", args, {"bias": randn(3, 40)[:, ::2]})
    yield Sample("strided token_of", args, {"token_of": torch.tensor([7, 0, 0, 0] * 4).int().to(device)[::2]})
    yield Sample("no rows", *call("q4_0", [0, 0], 20, 64))
    yield Sample("no columns", *call("q4_0", [2, 1], 0, 64))
    yield Sample("empty sums", *call("q5_1", [2, 1], 20, 0))
    wide = torch.full_like(randn(8, 90), torch.nan)
    wide[:, 3:67] = args[0]
    yield Sample("between NaN", (wide[:, 3:67], *args[1:]), kwargs, poison=True)


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    experts, n, k = 16, 1024, 1024
    for format in ("q4_0", "q8_0", "q4_k"):
        weight = torch.randn(experts * n, k, generator=make) * k**-0.5
        packed = pack_experts(reference.quantize(weight, format).unflatten(0, (experts, n)), format).to(device)
        for rows in (1, 64):
            x = torch.randn(experts * rows, k, generator=make).to(device, dtype)
            label = f"{format}, 16 experts of {rows} rows, {n} x {k}"
            yield Sample(label, (x, packed, format, n, offsets_of([rows] * experts, device)))


register(
    OpSpec(
        name="quantized_grouped_linear",
        op=quantized_grouped_linear,
        reference=reference.quantized_grouped_linear,
        torch_ops=("quantized_grouped_linear",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("quantised experts", "experts without rows", "gathered rows", "no gradient"),
        benchmarks=_benchmarks,
        flops=lambda s: 2.0 * s.args[0].numel() * s.args[3],
        bytes=lambda s: s.args[1].nbytes,
    )
)
