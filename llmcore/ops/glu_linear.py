"""A gated linear unit and the linear layer behind it, with little to remember between forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def glu_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "swiglu") -> Tensor:
    """linear(act(gate) * up, weight, bias) of the halves of gate_up (arXiv 2002.05202): `swiglu` or `geglu`, then
    torch's own linear.

    The product act(gate) * up is not kept for the backward pass, which computes it again, and the gradient of gate_up
    is written as one: its halves need no concatenation.

    Args:
        gate_up: (..., 2 * ffn_dim), the gate first; float32, bfloat16 or float16 (float64 through the reference).
        weight: (dim, ffn_dim), gate_up's dtype.
        bias: (dim,), or None.
        activation: "swiglu" (silu) or "geglu" (gelu, its tanh form).

    Returns:
        (..., dim) in gate_up's dtype.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit gate_up's; another activation.
    """
    _check(gate_up, weight, bias, activation)
    if not use_kernel("glu_linear", gate_up):
        return reference.glu_linear(gate_up, weight, bias, activation=activation)
    return _GluLinear.apply(gate_up, weight, bias, activation)


def _check(gate_up: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in ("swiglu", "geglu"):
        raise RuntimeError(f"glu_linear: activation is {activation!r}; accepted: 'swiglu', 'geglu'")
    tensors = [gate_up, weight] if bias is None else [gate_up, weight, bias]
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"glu_linear: tensors are on {', '.join(sorted(devices))}; all must be on one device")
    if any(t.dtype != gate_up.dtype for t in tensors):
        raise RuntimeError(f"glu_linear: dtypes are {[str(t.dtype) for t in tensors]}; accepted: all alike")
    if gate_up.ndim < 1 or weight.ndim != 2 or gate_up.shape[-1] != 2 * weight.shape[1]:
        raise RuntimeError(
            f"glu_linear: gate_up has shape {tuple(gate_up.shape)}, weight {tuple(weight.shape)}; accepted: "
            "(..., 2 * ffn_dim) and (dim, ffn_dim)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"glu_linear: bias has shape {tuple(bias.shape)}; accepted: ({weight.shape[0]},)")


def _activated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1) if gate_up.shape[-1] else (gate_up, gate_up)
    if activation == "swiglu":
        return torch.ops.llmcore.swiglu(gate, up)
    return torch.ops.llmcore.geglu(gate, up, "tanh")


class _GluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, activation):
        ctx.activation = activation
        ctx.save_for_backward(gate_up, weight)
        return F.linear(_activated(gate_up, activation), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        gate_up, weight = ctx.saved_tensors
        act, dgate_up = torch.ops.llmcore.glu_linear_backward(dy @ weight, gate_up, ctx.activation)
        rows = dy.reshape(-1, weight.shape[0])
        _, need_dweight, need_dbias, _ = ctx.needs_input_grad
        dweight = rows.t() @ act.reshape(-1, weight.shape[1]) if need_dweight else None
        return dgate_up, dweight, rows.sum(0) if need_dbias else None, None


@register_fake("glu_linear_backward")
def _(dact, gate_up, activation):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dact, gate_up))


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    for activation in ("swiglu", "geglu"):
        for shape, dim in (((3, 6), 5), ((1, 2), 1), ((2, 7, 64), 24), ((33, 222), 40), ((8,), 3), ((0, 16), 4)):
            call = randn(*shape), randn(dim, shape[-1] // 2)
            yield Sample(f"{activation}: {shape} to {dim}", call, {"activation": activation}, (0, 1))
    call = randn(9, 24), randn(10, 12), randn(10)
    yield Sample("bias", call, {}, (0, 1, 2))
    yield Sample("strided", (randn(5, 4, 40)[:, ::2, 3:35], randn(30, 32)[::2, ::2]), {}, (0, 1))
    yield Sample("transposed", (randn(32, 6).t(), randn(16, 7).t()), {}, (0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    call = torch.randn(2048, 2 * 1536).to(device, dtype), (torch.randn(512, 1536) / 40).to(device, dtype)
    yield Sample("2048x1536 to 512", call, {}, (0, 1))


def _peer(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight)


register(
    OpSpec(
        name="glu_linear",
        op=glu_linear,
        reference=reference.glu_linear,
        torch_ops=("swiglu", "geglu", "glu_linear_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("SwiGLU and GEGLU", "optional bias", "recomputes the unit", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=lambda s: 2.0 * s.args[0].numel() / 2 * s.args[1].shape[0],
    )
)
