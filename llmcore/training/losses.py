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
    where = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    with recompute_activations():
        output = model(batch.tokens, **where)
    total = linear_cross_entropy(
        output.hidden,
        model.lm_head_weight,
        batch.targets,
        softcap=model.config.logit_softcap,
        reduction="sum",
    )
    metrics: dict[str, Tensor | float] = {"nll": total.detach()}
    if output.aux_loss is not None:
        auxiliary = output.aux_loss * batch.num_targets
        total = total + auxiliary
        metrics["aux_loss"] = auxiliary.detach()
    if output.expert_load is not None:
        metrics["expert_load"] = output.expert_load.detach()
    return Loss(total, int(batch.num_targets), metrics)


def add_metrics(total: dict[str, Tensor | float], new: dict[str, Tensor | float]) -> None:
    """Add the metrics of one micro-batch to ``total`` in place."""
    for name, value in new.items():
        total[name] = total[name] + value if name in total else value


def mean_metrics(total: dict[str, Tensor | float], num_targets: int) -> dict[str, float]:
    """The scalar metrics of ``total`` per target, as floats."""
    scalars = {k: v for k, v in total.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
    return {name: float(value) / num_targets for name, value in scalars.items()}
