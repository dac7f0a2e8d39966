"""Losses: pure functions ``(model, batch) -> Loss``.

Every loss is summed over its targets, never averaged, and says how many there were. The loop divides the summed
gradient by the number of targets of the whole optimizer step, so k accumulation steps are one big batch even when
their numbers of targets differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.ops import linear_cross_entropy, recompute_activations


@dataclass
class Loss:
    """What a loss function gives the loop.

    ``total``: scalar with a gradient, summed over ``num_targets`` targets. ``metrics``: detached values that add up
    over micro-batches; a scalar (0-d tensor or float) is a sum over the targets and is reported divided by their
    number, a tensor of higher rank is a plain sum (such as the tokens each expert saw). ``metrics["nll"]`` is always
    there: the negative log-likelihood in nats without any auxiliary term.
    """

    total: Tensor
    num_targets: int
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


def next_token_loss(model: nn.Module, batch: Any) -> Loss:
    """Cross-entropy of every target given the tokens before it, plus the model's own auxiliary loss.

    ``batch`` holds packed 1-D ``tokens``, ``targets`` (-100 = no target) and ``positions`` (each (tokens,) int64),
    ``cu_seqlens`` (documents + 1,), ``max_seqlen`` and ``num_targets``. The logits are never held whole. The
    auxiliary loss is a mean over the micro-batch, so it enters multiplied by ``num_targets``.
    """
    with recompute_activations():
        output = model(batch.tokens, **_where(batch))
    total = _cross_entropy(model, output.hidden, batch.targets)
    metrics: dict[str, Tensor | float] = {"nll": total.detach()}
    return _with_experts(total, [output], batch, metrics)


def multi_token_loss(model: nn.Module, batch: Any, weight: float = 0.3) -> Loss:
    """`next_token_loss` plus `weight` times the mean cross-entropy of the modules that predict further tokens
    (DeepSeek-V3, arXiv 2412.19437, equations 24 and 25). ``metrics["mtp_nll"]`` is that mean.

    Depth k has a target fewer per sequence with each k; its sum too is divided by the number of all targets.
    """
    if not model.config.mtp_layers:
        raise ValueError("mtp_layers is 0; accepted: 1 or more for a loss over several tokens")
    with recompute_activations():
        output = model(batch.tokens, **_where(batch))
        ahead = model.look_ahead(output.hidden, batch.tokens, **_where(batch))
    main = _cross_entropy(model, output.hidden, batch.targets)
    further = main.new_zeros(())
    for depth, out in enumerate(ahead, 1):
        further = further + _cross_entropy(model, out.hidden, shifted_targets(batch.targets, batch.cu_seqlens, depth))
    further = further / len(ahead)
    metrics: dict[str, Tensor | float] = {"nll": main.detach(), "mtp_nll": further.detach()}
    return _with_experts(main + weight * further, [output, *ahead], batch, metrics)


def shifted_targets(targets: Tensor, cu_seqlens: Tensor, depth: int) -> Tensor:
    """The targets `depth` tokens later in the same sequence, -100 where it has ended. targets: packed (tokens,)."""
    ahead = torch.arange(len(targets), device=targets.device) + depth
    end_of = cu_seqlens[1:].long()
    ends = end_of[torch.searchsorted(end_of, ahead - depth, right=True).clamp(max=len(end_of) - 1)]
    return torch.where(ahead < ends, targets[ahead.clamp(max=len(targets) - 1)], -100)


def _where(batch: Any) -> dict[str, Any]:
    return {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}


def _cross_entropy(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    weight, cap = model.lm_head_weight, model.config.logit_softcap
    return linear_cross_entropy(hidden, weight, targets, softcap=cap, reduction="sum")


def _with_experts(total: Tensor, outputs: list, batch: Any, metrics: dict[str, Tensor | float]) -> Loss:
    """The loss with the auxiliary losses and the experts' loads of all `outputs`."""
    auxiliary = [output.aux_loss for output in outputs if output.aux_loss is not None]
    if auxiliary:
        auxiliary = torch.stack(auxiliary).sum() * batch.num_targets
        total = total + auxiliary
        metrics["aux_loss"] = auxiliary.detach()
    loads = [output.expert_load for output in outputs if output.expert_load is not None]
    if loads:
        metrics["expert_load"] = torch.cat(loads).detach()
    return Loss(total, int(batch.num_targets), metrics)


def add_metrics(total: dict[str, Tensor | float], new: dict[str, Tensor | float]) -> None:
    """Add the metrics of one micro-batch to ``total`` in place."""
    for name, value in new.items():
        total[name] = total[name] + value if name in total else value


def mean_metrics(total: dict[str, Tensor | float], num_targets: int) -> dict[str, float]:
    """The scalar metrics of ``total`` per target, as floats."""
    scalars = {k: v for k, v in total.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
    return {name: float(value) / num_targets for name, value in scalars.items()}
