"""linear_cross_entropy beside torch's linear and cross_entropy, which hold the logits: time, and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu import Row, assert_close, name_of
from bench.peak import peak_bytes
from llmcore import ops

TOKENS = 2048
SHAPES = ((512, 8192), (512, 32_768), (512, 131_072), (2048, 32_768))  # (dim, vocabulary)
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
MIB = 1 << 20


def _inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, dim, generator=make), torch.randn(vocab, dim, generator=make) * dim**-0.5
    targets = torch.randint(vocab, (tokens,), generator=make)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def _torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


LOSSES = {"llmcore": ops.linear_cross_entropy, "torch": _torch_loss}


def _call(loss: Callable, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(*inputs),)

    def both() -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:2])

    return both if backward else forward


def peak_call(name: str, tokens: int, dim: int, vocab: int, dtype: str) -> tuple[Callable, Callable]:
    """For bench/peak.py: the call, and a small one that warms up."""
    kind = getattr(torch, dtype)
    warm_up = _call(LOSSES[name], _inputs(64, 64, 512, kind), True)
    return _call(LOSSES[name], _inputs(tokens, dim, vocab, kind), True), warm_up


def _check(calls: dict[str, Callable], dtype: torch.dtype) -> Callable[[], None]:
    def check() -> None:
        names = ("loss", "dhidden", "dweight")
        for name, got, want in zip(names, calls["llmcore"](), calls["torch"]()):
            assert_close(name, got, want, LIMIT[dtype])

    return check


def _memory(dim: int, vocab: int, dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    def notes() -> dict[str, float]:
        peak = {n: peak_bytes("bench.cpu.loss:peak_call", n, TOKENS, dim, vocab, name_of(dtype)) for n in LOSSES}
        return {
            "peak_mib": round(peak["llmcore"] / MIB, 1),
            "torch_peak_mib": round(peak["torch"] / MIB, 1),
            "share_of_torch_peak": round(peak["llmcore"] / peak["torch"], 3),
        }

    return notes


def rows() -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        for dim, vocab in SHAPES:
            inputs = _inputs(TOKENS, dim, vocab, dtype)
            for backward in (False, True) if vocab == 32_768 and dim == 512 else (True,):
                calls = {name: _call(loss, inputs, backward) for name, loss in LOSSES.items()}
                yield Row(
                    kernel="linear_cross_entropy",
                    case=f"{TOKENS} tokens, d {dim}, V {vocab // 1024}k",
                    dtype=name_of(dtype),
                    direction="forward+backward" if backward else "forward",
                    calls=calls,
                    check=_check(calls, dtype),
                    must={"torch": 1.15} if backward else {},
                    aim={"torch": 1.4} if backward else {},
                    work=2.0 * TOKENS * dim * vocab * (3 if backward else 1),
                    ceiling=f"gemm_{name_of(dtype)}_gflops",
                    notes=_memory(dim, vocab, dtype) if backward else None,
                )
