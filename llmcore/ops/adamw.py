"""The AdamW update of many tensors in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmcore import reference
from llmcore.ops.registry import CPU_AND_CUDA, OpSpec, Sample, register, register_fake, use_kernel


def adamw_(
    weights: Sequence[Tensor],
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: float = 1.0,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
) -> None:
    """One AdamW step in place: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), as
    `torch.optim.AdamW` has it (bias correction, eps outside the square root), with the gradients' scaling and clipping.

    With g = grad / divisor * min(1, max_norm / norm), all in float32: exp_avg and exp_avg_sq become the running means
    of g and g^2, step grows by one, the master is decayed by lr * weight_decay and moved by lr * mean / (root of the
    mean square + eps), and the weight is the rounded master. When `norm` is not finite, nothing changes. The host does
    not wait for the device, so that a call can be captured in a CUDA graph.

    The lists are of one length, and tensors at one place in them have one shape. All tensors are contiguous, on one
    device, and none shares memory with another. Nothing is differentiable.

    Args:
        weights: float32, bfloat16 or float16, all alike (float64 through the reference). Mutated.
        masters: float32 masters of the weights, mutated; an empty list when the weights are float32, which are then
            updated themselves.
        grads: all float32, or all of the weights' dtype.
        exp_avgs, exp_avg_sqs: float32, mutated. Zeros before the first step.
        steps: the number of steps taken, one float32 element each, mutated.
        lr: the learning rate, a number or one float32 element on the weights' device.
        betas, eps, weight_decay: 0 <= beta < 1, 0 <= eps, 0 <= weight_decay.
        divisor: what the gradients are divided by, above 0: the targets of the step.
        norm: one float32 element, the norm of all gradients of the model divided by `divisor` (`global_norm`).
        max_norm: clips to this norm; 0 for no clipping.

    Raises:
        RuntimeError: a length, shape, dtype, device or number that does not fit. Nothing has been changed then.
    """
    numbers = (*betas, eps, weight_decay, divisor, max_norm)
    if not len(weights) or not use_kernel("adamw_", weights[0]):
        return reference.adamw_(
            weights, masters, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, divisor=divisor, norm=norm, max_norm=max_norm,
        )  # fmt: skip
    lr_tensor, lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    lists = [list(tensors) for tensors in (weights, masters, grads, exp_avgs, exp_avg_sqs, steps)]
    with torch.no_grad():
        torch.ops.llmcore.adamw_(*lists, norm, lr_tensor, lr, *numbers)
    if not torch.compiler.is_compiling() and not weights[0].is_inference():
        torch.autograd.graph.increment_version(lists[0])  # who saved one for a backward pass must learn that it changed


@register_fake("adamw_")
def _(weights, masters, grads, exp_avgs, exp_avg_sqs, steps, norm, lr_tensor, *numbers):
    return None


def _on_copies(function):
    """The op on copies of what it changes (a sample is used more than once), returning them."""

    def run(weights, masters, grads, exp_avgs, exp_avg_sqs, steps, **kwargs):
        changed = [[t.clone() for t in tensors] for tensors in (weights, masters, exp_avgs, exp_avg_sqs, steps)]
        function(*changed[:2], grads, *changed[2:], **kwargs)
        return tuple(t for tensors in changed for t in tensors)

    run.in_place = function
    return run


_NUMBERS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class _Maker:
    """Of samples: weights of a dtype with optimizer states as if some steps had been taken."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def args(self, shapes: Sequence[Sequence[int]], grad_dtype: torch.dtype, step: int = 5) -> tuple:
        masters = [self.randn(s) for s in shapes]
        return (
            [m.to(self.dtype) for m in masters],
            masters if self.dtype != torch.float32 else [],
            [self.randn(s, grad_dtype) for s in shapes],
            [self.randn(s) * (step > 0) for s in shapes],
            [self.randn(s).square() * (step > 0) for s in shapes],
            [torch.tensor(float(step + i), device=self.device) for i in range(len(shapes))],
        )


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = _Maker(dtype, device)

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    for grad_dtype in {dtype: None, torch.float32: None}:
        label = str(grad_dtype).removeprefix("torch.")
        for shapes in (((5,), (3, 4)), ((1,),), ((), (2, 0, 3), (64, 36)), ((0,),), ((9000,), (3,), (8192,))):
            clipped = {"norm": number(3.0), "max_norm": 1.5, "divisor": 7.0}
            yield Sample(f"{label}: {list(shapes)}", make.args(shapes, grad_dtype), {**_NUMBERS, **clipped})
        yield Sample(f"{label}: first step", make.args([(40, 6)], grad_dtype, step=0), _NUMBERS)
        yield Sample(f"{label}: late step", make.args([(40, 6)], grad_dtype, step=30_000), _NUMBERS)
        below = {"norm": number(1.2), "max_norm": 1.5, "weight_decay": 0.0, "lr": number(0.003)}
        yield Sample(f"{label}: not clipped, lr on the device", make.args([(70,)], grad_dtype), {**_NUMBERS, **below})
        yield Sample(f"{label}: 130 tensors", make.args([(i % 11,) for i in range(130)], grad_dtype), _NUMBERS)
        for value in (torch.inf, torch.nan):
            args = make.args([(50,), (4, 4)], grad_dtype)
            args[2][0][7] = value
            stopped = {"norm": number(value), "max_norm": 1.0}
            yield Sample(f"{label}: the norm is {value}", args, {**_NUMBERS, **stopped}, poison=True)
            yield Sample(f"{label}: the norm is {value}, no clipping", args, {**_NUMBERS, "norm": number(value)})


def _benchmarks(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    args = _Maker(dtype, device).args([(1024, 2048)] * 16, dtype)
    norm = torch.tensor(1.001, device=device)  # so close that a peer that scales gradients in place can go on and on
    yield Sample("16x 1024x2048", args, {**_NUMBERS, "lr": 1e-5, "norm": norm, "max_norm": 1.0})


def _peer(
    weights, masters, grads, exp_avgs, exp_avg_sqs, steps, *, lr, betas, eps, weight_decay, divisor=1.0, norm, max_norm
) -> None:  # fmt: skip
    """Clipping as `torch.nn.utils.clip_grad_norm_`, torch's fused AdamW on the masters, and a copy to the weights."""
    grads = torch._foreach_mul(grads, (max_norm / norm).clamp(max=1.0) / divisor)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        masters or weights, [g.float() for g in grads], exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0],
        beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if masters:
        torch._foreach_copy_(weights, masters)


def _bytes(sample: Sample) -> int:
    weights, masters, grads = sample.args[:3]
    state = 24 * sum(t.numel() for t in weights)  # master and moments, read and written
    return state + sum(t.nbytes for t in grads) + (sum(t.nbytes for t in weights) if masters else 0)


register(
    OpSpec(
        name="adamw_",
        op=_on_copies(adamw_),
        reference=_on_copies(reference.adamw_),
        torch_ops=("adamw_",),
        samples=_samples,
        dtypes=CPU_AND_CUDA,
        features=(
            "any number of tensors",
            "float32 masters",
            "clipping and lr on the device",
            "no host wait",
        ),
        benchmarks=_benchmarks,
        peer=_on_copies(_peer),
        bytes=_bytes,
    )
)
