"""Products with quantised weights: decode (few rows, weights from memory) and prompts (many rows)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.cpu import Row, assert_close
from llmcore import ops, reference

FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k")
COLD_BYTES = 160 << 20  # of weights that are cycled through: more than the caches hold
LAYERS = ((576, 1536), (1536, 576), (4096, 4096))  # (n, k); the first two are SmolLM2-135M's down and gate


def _without_gradient(call: Callable) -> Callable:
    def run(*args):
        with torch.no_grad():
            return call(*args)

    return run


def _row(format: str, rows: int, n: int, k: int, cold: bool) -> Row:
    blocks = reference.quantize(torch.randn(n, k) * k**-0.5, format)
    packed, weight = ops.pack_quantized(blocks, format), reference.dequantize(blocks, format).bfloat16()
    x = torch.randn(rows, k)
    x_bf16 = x.bfloat16()
    copies = -(-COLD_BYTES // packed.nbytes) if cold else 1
    weights = itertools.cycle([ops.pack_quantized(blocks, format) for _ in range(copies)])
    peers = itertools.cycle([weight.clone() for _ in range(-(-COLD_BYTES // weight.nbytes) if cold else 1)])

    def check() -> None:
        exact = reference.quantized_linear(x.double(), packed, format, n)
        assert_close("llmcore", ops.quantized_linear(x, packed, format, n), exact, 1e-5)
        assert_close("torch in bfloat16", F.linear(x_bf16, weight), exact, 2e-2)  # which rounds neither of the two

    calls = {
        "llmcore": _without_gradient(lambda: ops.quantized_linear(x, next(weights), format, n)),
        "torch bfloat16": _without_gradient(lambda: F.linear(x_bf16, next(peers))),
    }
    case = f"M {rows}, {n} x {k}, {'cold' if cold else 'warm'}"
    work, ceiling = (packed.nbytes, "read_gbytes") if rows == 1 else (2.0 * rows * n * k, "gemm_bfloat16_gflops")
    return Row("quantized_linear", case, format, "forward", calls, check, work=work, ceiling=ceiling)


def _experts_row(format: str, rows: int, experts: int = 48, top: int = 8, n: int = 1536, k: int = 2048) -> Row:
    """`top` experts with so many rows each; call after call other ones, so that weights come from memory."""
    blocks = reference.quantize(torch.randn(experts * n, k) * k**-0.5, format)
    packed = ops.pack_experts(blocks.unflatten(0, (experts, n)), format)
    weight = reference.dequantize(blocks, format).bfloat16().unflatten(0, (experts, n))
    x = torch.randn(top * rows, k)
    x_bf16 = x.bfloat16()
    counts = torch.zeros(experts // top, experts, dtype=torch.int32)
    for i, chosen in enumerate(torch.randperm(experts, generator=torch.Generator().manual_seed(0)).view(-1, top)):
        counts[i, chosen] = rows
    bounds = [torch.cat([c.new_zeros(1), c.cumsum(0)]).int() for c in counts]
    ours, peers = itertools.cycle(bounds), itertools.cycle(bounds)

    def check() -> None:
        exact = reference.quantized_grouped_linear(x.double(), packed, format, n, bounds[0])
        assert_close("llmcore", ops.quantized_grouped_linear(x, packed, format, n, bounds[0]), exact, 1e-5)
        assert_close("grouped_gemm in bfloat16", ops.grouped_gemm(x_bf16, weight, bounds[0]), exact, 2e-2)

    calls = {
        "llmcore": _without_gradient(lambda: ops.quantized_grouped_linear(x, packed, format, n, next(ours))),
        "grouped_gemm bfloat16": _without_gradient(lambda: ops.grouped_gemm(x_bf16, weight, next(peers))),
    }
    case = f"{top} of {experts} experts, {rows} rows each, {n} x {k}, cold"
    few = (packed.nbytes / experts * top, "read_gbytes")
    work, ceiling = few if rows == 1 else (2.0 * top * rows * n * k, "gemm_bfloat16_gflops")
    return Row("quantized_grouped_linear", case, format, "forward", calls, check, work=work, ceiling=ceiling)


def rows() -> Iterator[Row]:
    for format in FORMATS:
        yield _row(format, 1, 4096, 4096, cold=True)
        yield _row(format, 16, 4096, 4096, cold=True)
    for format, (n, k) in itertools.product(("q4_1", "q8_0"), LAYERS):
        yield _row(format, 512, n, k, cold=False)
    for format, count in itertools.product(("q4_0", "q8_0", "q4_k"), (1, 64)):
        yield _experts_row(format, count)
