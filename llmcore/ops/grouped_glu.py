"""The first half of a mixture of gated experts: one product per expert, then the gated linear unit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.grouped_gemm import DTYPES, assignments, bytes_moved, offsets_of
from llmcore.ops.registry import OpSpec, Sample, register, register_fake, use_kernel


def grouped_glu(
    x: Tensor,
    gate_up: Tensor,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    row_of: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """act(gate[r]) * up[r] for every row r of expert e, (gate[r], up[r]) = gate_up[e] @ x[r] (arXiv 2002.05202).

    As `swiglu` or `geglu` of `grouped_gemm`; on CUDA in one kernel, which writes gate and up only when a gradient is
    asked for. Gradients reach x and gate_up.

    Args:
        x, offsets, token_of, row_of: as in `grouped_gemm`.
        gate_up: (num_experts, 2 * ffn_dim, k), x's dtype; an expert's gate stands in the first ffn_dim rows. It is
            copied first unless k is contiguous.
        activation: "swiglu" (silu) or "geglu" (gelu, its tanh form).

    Returns:
        (rows, ffn_dim) in x's dtype.

    Raises:
        RuntimeError: as in `grouped_gemm`; when gate_up has no two halves; for another activation.
    """
    if not use_kernel("grouped_glu", x):
        return reference.grouped_glu(x, gate_up, offsets, token_of=token_of, row_of=row_of, activation=activation)
    keep = torch.is_grad_enabled() and (x.requires_grad or gate_up.requires_grad)
    return torch.ops.llmcore.grouped_glu(x, gate_up, offsets, token_of, row_of, activation, keep)[0]


@register_fake("grouped_glu")
def _(x, gate_up, offsets, token_of, row_of, activation, keep):
    rows, n = (x if token_of is None else token_of).shape[0], gate_up.shape[1]
    return x.new_empty(rows, n // 2), x.new_empty((rows, n) if keep else 0)


@register_fake("grouped_glu_backward")
def _(dout, kept, x, gate_up, offsets, token_of, row_of, activation, need_dx, need_dgate_up):
    return (
        x.new_empty(x.shape if need_dx else 0),
        gate_up.new_empty(gate_up.shape if need_dgate_up else 0),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    kept = output[1]
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # or `kept`, with the most memory of all, would get a gradient of zeros
    ctx.save_for_backward(kept, *tensors)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 7
    need_dx, need_dgate_up = ctx.needs_input_grad[:2]
    dx, dgate_up = torch.ops.llmcore.grouped_glu_backward(
        dout, *ctx.saved_tensors, ctx.activation, need_dx, need_dgate_up
    )
    return dx if need_dx else None, dgate_up if need_dgate_up else None, None, None, None, None, None


torch.library.register_autograd("llmcore::grouped_glu", _backward, setup_context=_save)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def call(rows: list[int], ffn: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        gate_up = randn(len(rows), 2 * ffn, k) * k**-0.5  # gates of about 1, where the activation bends
        return randn(sum(rows), k), gate_up, offsets_of(rows, device)

    for rows, ffn, k in (
        ([1], 1, 1),
        ([0, 1, 2, 3, 4, 5, 0], 9, 7),
        ([4, 0, 19, 2, 1], 131, 112),
        ([130, 5, 0, 1], 75, 72),
        ([8, 33, 32, 9], 20, 230),
        ([0, 150, 0], 136, 33),
        ([1] * 35, 24, 72),
    ):
        yield Sample(f"{rows} ffn {ffn} k {k}", call(rows, ffn, k), {}, (0, 1))
    yield Sample("long sums", call([9, 2], 17, 600), {}, (0, 1))
    yield Sample("no rows", call([0, 0, 0], 8, 16), {}, (0, 1))
    x, gate_up, offsets = call([3, 7, 0, 12], 24, 32)
    yield Sample("geglu", (x, gate_up, offsets), {"activation": "geglu"}, (0, 1))
    yield Sample("no gradient", (x, gate_up, offsets))
    yield Sample("no gradient of x", (x, gate_up, offsets), {}, (1,))
    yield Sample("strided rows", (randn(44, 50)[::2, 9:41], gate_up, offsets), {}, (0, 1))
    yield Sample("weight by columns", (x, randn(4, 32, 48).transpose(1, 2), offsets), {}, (0, 1))
    wide = torch.full_like(randn(4, 50, 40), torch.nan)
    wide[:, 1:49, 5:37] = gate_up
    yield Sample("weight between NaN", (x, wide[:, 1:49, 5:37], offsets), {}, (0, 1), poison=True)
    for rows, top_k, ffn, k in (([3, 7, 0, 12], 2, 24, 32), ([0, 129, 30], 3, 40, 71), ([2, 0, 0], 1, 5, 9)):
        x, gate_up, offsets = call(rows, ffn, k)
        kwargs = assignments(rows, top_k, make, device)
        for activation in ("swiglu", "geglu"):
            args = (x[: sum(rows) // top_k].clone(), gate_up, offsets)
            label = f"{activation}, gathered, top {top_k} of {rows}"
            yield Sample(label, args, {**kwargs, "activation": activation}, (0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    experts, ffn, k = 16, 512, 1024
    gate_up = (torch.randn(experts, 2 * ffn, k, generator=make) * k**-0.5).to(device, dtype)
    for rows in (256, 2):
        x = torch.randn(experts * rows, k, generator=make).to(device, dtype)
        label = f"16 experts of {rows} rows, {2 * ffn}x{k}"
        yield Sample(label, (x, gate_up, offsets_of([rows] * experts, device)), {}, (0, 1))


def _peer(x: Tensor, gate_up: Tensor, offsets: Tensor, *, token_of: Tensor | None = None, **_) -> Tensor:
    x = x if token_of is None else x[token_of]
    if x.is_cuda:
        y = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=offsets[1:])
    else:
        groups = x.split(offsets.diff().tolist())
        y = torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(groups, gate_up)])
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


register(
    OpSpec(
        name="grouped_glu",
        op=grouped_glu,
        reference=reference.grouped_glu,
        torch_ops=("grouped_glu", "grouped_glu_backward"),
        samples=_samples,
        dtypes=DTYPES,
        features=("SwiGLU and GEGLU", "experts without rows", "gathered rows", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=lambda s: 2.0 * int(s.args[2][-1]) * s.args[1].shape[1] * s.args[1].shape[2],
        bytes=lambda s: bytes_moved(s, s.args[1].shape[1] // 2),
    )
)
