"""What an optimizer does to its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcore.reference.checks import check, check_shape


def global_norm(tensors: list[Tensor]) -> Tensor:
    """See `llmcore.ops.global_norm`."""
    check(len(tensors) > 0, "global_norm: the list of tensors is empty; accepted: one or more")
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    # torch sums pairwise, but not in its norm: on a CPU that of two million float32 elements is off by 3e-5
    return torch.stack([t.to(wide).square().sum() for t in tensors]).sum().sqrt()


@torch.no_grad()
def adamw_(
    weights: list[Tensor],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: float = 1.0,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
) -> None:
    """See `llmcore.ops.adamw_`."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    for name, tensors in (lists | {"masters": masters} if len(masters) else lists).items():
        check(len(tensors) == len(weights), f"adamw_: {name} holds {len(tensors)} tensors, weights {len(weights)}")
        for i, (tensor, weight) in enumerate(zip(tensors, weights)):
            if name != "steps":
                check_shape(f"adamw_: {name}[{i}]", tensor, *weight.shape)
    go = torch.tensor(True) if norm is None else norm.isfinite()
    clip = 1.0 if norm is None or not max_norm else (max_norm / norm).clamp(max=1.0)

    def replace(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(go, new, old))

    for weight, master, grad, exp_avg, exp_avg_sq, step in zip(
        weights, masters or weights, grads, exp_avgs, exp_avg_sqs, steps
    ):
        g = grad.to(master.dtype) * (clip / divisor)
        replace(step, step + 1)
        replace(exp_avg, betas[0] * exp_avg + (1 - betas[0]) * g)
        replace(exp_avg_sq, betas[1] * exp_avg_sq + (1 - betas[1]) * g.square())
        update = (exp_avg / (1 - betas[0] ** step)) / ((exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps)
        replace(master, master * (1 - lr * weight_decay) - lr * update)
        if weight is not master:
            replace(weight, master.to(weight.dtype))
