"""Gated linear units: SwiGLU and GEGLU (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + e^-x).

    Args:
        gate: (..., dim), float32, bfloat16 or float16 (float64 through the reference). gate and up may be strided, such
            as the halves of one fused projection.
        up: gate's shape and dtype.

    Returns:
        gate's shape and dtype, contiguous; computed in float32 and rounded once.

    Raises:
        RuntimeError: up's shape, dtype or device differs from gate's.
    """
    if not use_kernel("swiglu", gate):
        return reference.swiglu(gate, up)
    return torch.ops.llmcore.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up.

    Args:
        gate, up: as in `swiglu`.
        approximate: "tanh": gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); "none": x/2 (1 + erf(x/sqrt(2)))
            (Hendrycks & Gimpel, arXiv 1606.08415).

    Returns:
        gate's shape and dtype, contiguous; computed in float32 and rounded once.

    Raises:
        RuntimeError: up's shape, dtype or device differs from gate's, or `approximate` is neither of the two.
    """
    if not use_kernel("geglu", gate):
        return reference.geglu(gate, up, approximate)
    return torch.ops.llmcore.geglu(gate, up, approximate)


@register_fake("swiglu")
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@register_fake("geglu")
def _(gate, up, approximate):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@register_fake("swiglu_backward")
def _(dy, gate, up):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


@register_fake("geglu_backward")
def _(dy, gate, up, approximate):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


def _save(ctx, inputs, output):
    gate, up, *approximate = inputs
    op = torch.ops.llmcore.geglu if approximate else torch.ops.llmcore.swiglu
    ctx.approximate = approximate
    ctx.recompute = lambda ctx: op(*ctx.saved_tensors, *approximate)
    ctx.save_for_backward(gate, up)


def _swiglu_backward(ctx, dy):
    return torch.ops.llmcore.swiglu_backward(dy, *ctx.saved_tensors)


def _geglu_backward(ctx, dy):
    return *torch.ops.llmcore.geglu_backward(dy, *ctx.saved_tensors, *ctx.approximate), None


torch.library.register_autograd("llmcore::swiglu", _swiglu_backward, setup_context=_save)
torch.library.register_autograd("llmcore::geglu", _geglu_backward, setup_context=_save)


def _pairs(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    for shape in ((3, 5), (1, 1), (2, 7, 64), (33, 111), (4, 1000), (59,)):
        yield f"{shape}", (randn(*shape), randn(*shape))
    yield "halves of one projection", randn(5, 2, 2 * 59).chunk(2, -1)
    yield "interleaved halves", tuple(randn(5, 40, 2).unbind(-1))
    yield "transposed", (randn(64, 5).t(), randn(64, 5).t())
    yield "no rows", (randn(0, 16), randn(0, 16))
    yield "empty last dimension", (randn(3, 0), randn(3, 0))
    # the tails of the activations, where the gradient of a float16 gate would underflow gracefully or not at all
    yield "wide range", (torch.linspace(-30, 30, 241).to(device, dtype), randn(241))


def _swiglu_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for label, pair in _pairs(dtype, device):
        yield Sample(label, pair, differentiable=(0, 1))


def _geglu_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for approximate in ("tanh", "none"):
        for label, pair in _pairs(dtype, device):
            yield Sample(f"{approximate}: {label}", (*pair, approximate), differentiable=(0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    gate, up = torch.randn(2048, 2 * 5632).to(device, dtype).chunk(2, -1)
    yield Sample("2048x5632", (gate, up), differentiable=(0, 1))


def _bytes(sample: Sample) -> float:
    return 3 * sample.args[0].numel() * sample.args[0].element_size()


register(
    OpSpec(
        name="swiglu",
        op=swiglu,
        reference=reference.swiglu,
        torch_ops=("swiglu", "swiglu_backward"),
        samples=_swiglu_samples,
        dtypes=CPU_AND_CUDA,
        features=("strided halves", "backward"),
        benchmarks=_benchmarks,
        peer=lambda gate, up: torch.nn.functional.silu(gate) * up,
        bytes=_bytes,
    )
)
register(
    OpSpec(
        name="geglu",
        op=geglu,
        reference=reference.geglu,
        torch_ops=("geglu", "geglu_backward"),
        samples=_geglu_samples,
        dtypes=CPU_AND_CUDA,
        features=("tanh or erf", "strided halves", "backward"),
        benchmarks=_benchmarks,
        peer=lambda gate, up, approximate="tanh": torch.nn.functional.gelu(gate, approximate=approximate) * up,
        bytes=_bytes,
    )
)
