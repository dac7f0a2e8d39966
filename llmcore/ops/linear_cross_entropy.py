"""Cross-entropy of a linear layer that never holds the (tokens, vocab) logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmcore import reference
from llmcore.ops import linear_cross_entropy_cuda  # noqa: F401  (registers the ops' CUDA side)
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits = hidden @ weight.T against targets, computed chunk by chunk.

    With lse = logsumexp(logits), the loss of a token is

        lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean(logits) + z_loss * lse^2

    (label smoothing as in `torch.nn.functional.cross_entropy`; z-loss as in PaLM, arXiv 2204.02311). Memory beyond
    inputs and gradients is the logits of at most some hundred tokens. When a gradient is needed and the loss is
    reduced, it is computed in the forward pass from the same logits, as in Liger Kernel (arXiv 2410.10989); with
    reduction "none", the backward pass computes the logits again.

    Args:
        hidden: (..., dim), float32, bfloat16 or float16 (float64 through the reference).
        weight: (vocab, dim), hidden's dtype.
        targets: (...) int64: ids in [0, vocab), or ignore_index.
        ignore_index: tokens with this target have loss 0 and gradient 0, and their hidden is not read.
        softcap: c, 1e-30 to 1e30, replaces the logits by c * tanh(logits / c).
        z_loss: weight of lse^2.
        label_smoothing: 0 to 1.
        reduction: "mean" over the tokens that are not ignored (0 with zero gradients when all are, where torch gives
            NaN), "sum", or "none".

    Returns:
        float32 (float64 for float64): a scalar, or with "none" the losses, shaped as targets.

    Raises:
        RuntimeError: naming the target and its index, when it is neither ignore_index nor in [0, vocab). On a CUDA
            device such a token has loss NaN and gradient 0, and `llmcore.ops.check_device_errors` raises the error.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; accepted: 'mean', 'sum', 'none'")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap is {softcap}; it must be positive, or None")
    if not use_kernel("linear_cross_entropy", hidden):
        return reference.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip
    arguments = (ignore_index, softcap or 0.0, z_loss, label_smoothing)
    need_dhidden, need_dweight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    # float16 gradients wait for the incoming factor, a loss scale maybe: before it they could underflow.
    if reduction != "none" and (need_dhidden or need_dweight) and hidden.dtype != torch.float16:
        return torch.ops.llmcore.linear_cross_entropy_with_grad(
            hidden, weight, targets, *arguments, reduction == "mean", need_dhidden, need_dweight
        )[0]
    losses, _ = torch.ops.llmcore.linear_cross_entropy(hidden, weight, targets, *arguments)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / ((targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)


@register_fake("linear_cross_entropy")
def _(hidden, weight, targets, ignore_index, softcap, z_loss, label_smoothing):
    losses = hidden.new_empty(targets.numel(), dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _gradients_like(hidden, weight, need_dhidden, need_dweight):
    return hidden.new_empty(hidden.shape if need_dhidden else 0), weight.new_empty(weight.shape if need_dweight else 0)


@register_fake("linear_cross_entropy_backward")
def _(dloss, hidden, weight, targets, lse, ignore_index, softcap, z_loss, label_smoothing, need_dhidden, need_dweight):
    return _gradients_like(hidden, weight, need_dhidden, need_dweight)


@register_fake("linear_cross_entropy_with_grad")
def _(hidden, weight, targets, ignore_index, softcap, z_loss, label_smoothing, mean, need_dhidden, need_dweight):
    gradients = _gradients_like(hidden, weight, need_dhidden, need_dweight)
    return hidden.new_empty((), dtype=torch.float32), *gradients


def _save(ctx, inputs, output):
    hidden, weight, targets, *arguments = inputs
    _, lse = output
    ctx.arguments = arguments
    ctx.save_for_backward(hidden, weight, targets, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _):
    if dloss is None:
        return (None,) * 7
    need_dhidden, need_dweight = ctx.needs_input_grad[:2]
    dhidden, dweight = torch.ops.llmcore.linear_cross_entropy_backward(
        dloss, *ctx.saved_tensors, *ctx.arguments, need_dhidden, need_dweight
    )
    return dhidden if need_dhidden else None, dweight if need_dweight else None, None, None, None, None, None


def _save_gradients(ctx, inputs, output):
    _, dhidden, dweight = output
    ctx.needed = inputs[-2:]
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)  # or they would get gradients of zeros, which take as much memory again


@once_differentiable  # the saved gradients are constants to autograd: second derivatives must fail, not come out wrong
def _scale_gradients(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    scale = _scaled if _may_overwrite(dloss) else torch.mul
    gradients = (scale(g, dloss) if needed else None for g, needed in zip(ctx.saved_tensors, ctx.needed))
    return *gradients, None, None, None, None, None, None, None, None


def _may_overwrite(dloss: Tensor) -> bool:
    """Whether the saved gradients are not asked for again: their memory is that of a weight, and a copy of it costs."""
    eager = type(dloss) is Tensor and not torch.compiler.is_compiling()
    return eager and not torch._C._autograd._get_current_graph_task_keep_graph()


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # On a CPU the factor can be looked at, and it is 1 unless the loss is only a part of what is differentiated.
    return gradient if factor.device.type == "cpu" and factor == 1 else gradient.mul_(factor)


torch.library.register_autograd("llmcore::linear_cross_entropy", _backward, setup_context=_save)
torch.library.register_autograd(
    "llmcore::linear_cross_entropy_with_grad", _scale_gradients, setup_context=_save_gradients
)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(device, dtype)

    def targets(vocab: int, *shape: int, ignored: float = 0.0) -> Tensor:
        ids = torch.randint(vocab, shape, generator=make)
        return ids.masked_fill(torch.rand(shape, generator=make) < ignored, -100).to(device)

    for tokens, dim, vocab in ((1, 1, 1), (5, 7, 11), (33, 64, 257), (70, 59, 1100), (600, 8, 40), (40, 300, 5)):
        for reduction in ("mean", "none"):
            call = randn(tokens, dim), randn(vocab, dim) * dim**-0.5, targets(vocab, tokens)
            yield Sample(f"{tokens}x{dim}x{vocab} {reduction}", call, {"reduction": reduction}, (0, 1))
    everything = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1}
    for label, value in everything.items():
        call = randn(6, 16), randn(37, 16), targets(37, 6)
        yield Sample(f"{label}", call, {label: value}, (0, 1))
    for reduction in ("mean", "sum", "none"):
        call = randn(2, 300, 24), randn(90, 24), targets(90, 2, 300, ignored=0.4)
        yield Sample(f"everything {reduction}", call, {"reduction": reduction, **everything}, (0, 1))
    for reduction in ("mean", "none"):
        poisoned, ids = randn(9, 16), targets(30, 9)
        poisoned[2:5], ids[2:5] = float("nan"), 7
        kwargs = {"reduction": reduction, "ignore_index": 7}
        yield Sample(f"poison {reduction}", (poisoned, randn(30, 16), ids), kwargs, (0, 1), poison=True)
        nothing = torch.full((4,), -100, device=device)
        yield Sample(f"all ignored {reduction}", (randn(4, 8), randn(9, 8), nothing), {"reduction": reduction}, (0, 1))
        none = nothing[:0]
        yield Sample(f"no tokens {reduction}", (randn(0, 8), randn(9, 8), none), {"reduction": reduction}, (0, 1))
    hidden, weight = randn(3, 8, 50)[:, ::2, 5:37], randn(60, 50)[::2, 9:41]
    yield Sample("strided", (hidden, weight, targets(30, 4, 3).t()), {}, (0, 1))
    yield Sample("transposed", (randn(32, 10).t(), randn(32, 21).t(), targets(21, 10)), {}, (0, 1))
    yield Sample("no weight gradient", (randn(6, 16), randn(37, 16), targets(37, 6)), {}, (0,))
    yield Sample("no hidden gradient", (randn(6, 16), randn(37, 16), targets(37, 6)), {}, (1,))
    yield Sample("large logits", (randn(6, 16) * 30, randn(300, 16), targets(300, 6)), {}, (0, 1))
    yield Sample("far below 0", (randn(6, 16).abs() * 30, -randn(70, 16).abs(), targets(70, 6)), {}, (0, 1))


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(0)
    tokens, dim, vocab = 2048, 512, 32000
    hidden, weight = torch.randn(tokens, dim, generator=make), torch.randn(vocab, dim, generator=make) * dim**-0.5
    targets = torch.randint(vocab, (tokens,), generator=make).to(device)
    yield Sample(f"{tokens}x{dim}x{vocab}", (hidden.to(device, dtype), weight.to(device, dtype), targets), {}, (0, 1))


def _peer(hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """torch's own way, which holds the logits."""
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)


register(
    OpSpec(
        name="linear_cross_entropy",
        op=linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        torch_ops=("linear_cross_entropy_with_grad", "linear_cross_entropy", "linear_cross_entropy_backward"),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=("ignore_index", "soft-capping", "z-loss", "label smoothing", "backward"),
        benchmarks=_benchmarks,
        peer=_peer,
        flops=lambda s: 2.0 * s.args[0].numel() * s.args[1].shape[0],
    )
)
