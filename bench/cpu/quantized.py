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


def rows() -> Iterator[Row]:
    for format in FORMATS:
        yield _row(format, 1, 4096, 4096, cold=True)
        yield _row(format, 16, 4096, 4096, cold=True)
    for format, (n, k) in itertools.product(("q4_1", "q8_0"), LAYERS):
        yield _row(format, 512, n, k, cold=False)
