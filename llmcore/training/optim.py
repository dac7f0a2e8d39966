"""AdamW and Muon over fp32 master weights.

The optimizer owns what the update needs in fp32: a master copy of every weight the model holds in a narrower dtype
(an fp32 weight is its own master), the accumulated gradient and the moments. The model only ever computes.

Scaling, clipping, the AdamW update and the rounding to the model's dtype are one pass of ``ops.adamw_`` over memory,
for all parameters at once. Parameters and gradients stay tensors of their own: autograd hands out gradients one by one,
and to gather them in a flat buffer would be one more pass, and would hide which parameter got none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops.registry import HALVES

# Tables with one row per token id or position: a row is looked up (or matched) on its own, so the matrix is no linear
# map between features and Muon's orthogonal update has no meaning for it.
_TABLE = re.compile(r"(^|[._])(embed\w*|embedding\w*|wte|wpe|lm_head|unembed\w*)([._]|$)")


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is NaN or infinite. Raised before anything good is touched."""


@dataclass(frozen=True)
class OptimConfig:
    """``lr`` is the peak; ``momentum`` is Muon's; ``betas`` and ``eps`` are AdamW's."""

    kind: str = "adamw"  # adamw | muon
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    grad_clip: float = 1.0  # global norm; 0 = no clipping

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optim.kind is {self.kind!r}; accepted are 'adamw' and 'muon'")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr is {self.lr}; accepted is a number above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas is {self.betas}; accepted are two numbers from 0 to below 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum is {self.momentum}; accepted is a number from 0 to below 1")
        for name in ("eps", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; accepted is 0 or more")


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], kind: str) -> dict[str, list[str]]:
    """Which rule updates which parameter: names under ``adamw_decay``, ``adamw_no_decay`` and ``muon``.

    Vectors (norm weights, biases, sinks) are never decayed. With ``kind="muon"`` every matrix (stacked expert
    matrices too) goes to Muon except the embedding and output tables, as in Keller Jordan's recipe.
    """
    groups: dict[str, list[str]] = {"adamw_decay": [], "adamw_no_decay": [], "muon": []}
    for name, parameter in parameters:
        if parameter.ndim < 2:
            groups["adamw_no_decay"].append(name)
        elif kind == "muon" and not _TABLE.search(name):
            groups["muon"].append(name)
        else:
            groups["adamw_decay"].append(name)
    return groups


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)  # without gaps, whatever `like` has


def newton_schulz(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to ``gradient`` (..., m, n), by a quintic Newton-Schulz iteration.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024): the coefficients trade exactness
    for speed, so singular values land in about [0.7, 1.2]. Computed in fp32 on the CPU, bf16 on a GPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16() if gradient.is_cuda else gradient.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # iterate on the smaller Gram matrix
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return (x.mT if tall else x).to(gradient.dtype)


@torch.no_grad()
def muon_update(weight: Tensor, gradient: Tensor, buffer: Tensor, lr: float, momentum: float, decay: float) -> None:
    """One Muon step in place on fp32 ``weight`` and momentum ``buffer``, each (..., m, n). ``gradient`` is kept.

    The orthogonal update has a root mean square of 1 / sqrt(max(m, n)); times 0.2 * sqrt(max(m, n)) it has that of
    a typical AdamW update, so AdamW's learning rate and decay carry over (Moonlight, arXiv 2502.16982).
    """
    buffer.lerp_(gradient, 1.0 - momentum)
    update = newton_schulz(gradient.lerp(buffer, momentum))  # Nesterov
    weight.mul_(1.0 - lr * decay)
    weight.add_(update, alpha=-lr * 0.2 * max(weight.shape[-2:]) ** 0.5)


class Optimizer:
    """AdamW (arXiv 1711.05101), or Muon for the hidden matrices and AdamW for the rest.

    Per optimizer step: :meth:`accumulate` after every backward pass, then :meth:`gradient_norm`, then :meth:`step`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no trainable parameter")
        self.masters = {
            n: p if p.dtype == torch.float32 else p.detach().float().contiguous() for n, p in self.parameters.items()
        }
        groups = parameter_groups(self.parameters.items(), config.kind)
        self.muon = {n: torch.zeros_like(self.masters[n], requires_grad=False) for n in groups["muon"]}
        self.adamw = {config.weight_decay: groups["adamw_decay"]}
        self.adamw.setdefault(0.0, []).extend(groups["adamw_no_decay"])
        self.moments = {
            n: {
                "step": torch.zeros((), dtype=torch.float32, device=self.masters[n].device),
                "exp_avg": _zeros(self.masters[n]),
                "exp_avg_sq": _zeros(self.masters[n]),
            }
            for names in self.adamw.values()
            for n in names
        }
        self._accumulated: dict[str, Tensor] = {}  # the gradients of weights that have a master, by name
        self._divisor = 1.0

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of narrow weights from the model. From the second micro-batch on they are added up in
        float32: sums in bf16 would lose small ones."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is parameter or parameter.grad is None:
                continue
            if name in self._accumulated:  # .float() widens the first one, and from then on is the sum itself
                self._accumulated[name] = self._accumulated[name].float().add_(parameter.grad)
            else:
                self._accumulated[name] = parameter.grad
            parameter.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The sums of the gradients since the last step, before any scaling. A parameter that got none is left out."""
        found = {n: p.grad if self.masters[n] is p else self._accumulated.get(n) for n, p in self.parameters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    @torch.no_grad()
    def gradient_norm(self, divisor: float) -> Tensor:
        """The global L2 norm of the gradients divided by ``divisor`` (the targets of the step), by which :meth:`step`
        then divides them too. A tensor on the model's device: to read it is to wait for the backward pass."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self.gradients.values():
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        if not by_dtype:
            raise ValueError("no parameter has a gradient: the loss does not depend on the model")
        self._divisor = divisor
        norms = [ops.global_norm(gradients).float() for gradients in by_dtype.values()]
        return (norms[0] if len(norms) == 1 else torch.stack(norms).norm()) / divisor

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: Tensor | float) -> None:
        """Clip to ``config.grad_clip`` by the global norm, update the weights, clear the gradients.

        A parameter without a gradient (an expert no token reached) is left as it is. A non-finite norm raises
        :class:`NonFiniteError` and changes nothing.
        """
        if not math.isfinite(gradient_norm):
            raise NonFiniteError(f"the gradient norm is {float(gradient_norm)}")
        gradients = self.gradients
        device = next(iter(self.masters.values())).device
        norm = torch.as_tensor(gradient_norm, dtype=torch.float32, device=device)
        for decay, names in self.adamw.items():
            self._adamw_step({n: gradients[n] for n in names if n in gradients}, norm, lr, decay)
        self._muon_step({n: gradients[n] for n in self.muon if n in gradients}, norm, lr)
        self.zero_grad()

    def _adamw_step(self, gradients: dict[str, Tensor], norm: Tensor, lr: float, decay: float) -> None:
        calls: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, ...]]] = {}  # one for each pair of dtypes
        unwritten: list[tuple[Tensor, Tensor]] = []
        for name, gradient in gradients.items():
            parameter, master = self.parameters[name].detach(), self.masters[name].detach().contiguous()
            # the kernel writes float32 masters, and 16-bit weights beside them, without gaps: others are copied to
            weight = parameter if parameter.dtype in HALVES and parameter.is_contiguous() else master
            if weight is master and master.data_ptr() != parameter.data_ptr():
                unwritten.append((parameter, master))
            gradient = gradient.contiguous() if gradient.dtype == weight.dtype else gradient.float().contiguous()
            moments = self.moments[name]
            tensors = (weight, master, gradient, moments["exp_avg"], moments["exp_avg_sq"], moments["step"])
            calls.setdefault((weight.dtype, gradient.dtype), []).append(tensors)
        for (dtype, _), rows in calls.items():
            weights, masters, *others = map(list, zip(*rows))
            ops.adamw_(
                weights,
                [] if dtype == torch.float32 else masters,
                *others,
                lr=lr,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=decay,
                divisor=self._divisor,
                norm=norm,
                max_norm=self.config.grad_clip,
            )
        for parameter, master in unwritten:
            parameter.copy_(master)

    def _muon_step(self, gradients: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        clip = self.config.grad_clip
        scale = ((clip / norm).clamp(max=1.0) if clip else torch.ones_like(norm)) / self._divisor
        for name, gradient in gradients.items():
            master, config = self.masters[name], self.config
            muon_update(master, gradient.float() * scale, self.muon[name], lr, config.momentum, config.weight_decay)
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._accumulated.clear()
        self._divisor = 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs: ``master.*``, ``exp_avg.*``, ``exp_avg_sq.*``, ``step.*``, ``muon.*``."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                tensors[f"master.{name}"] = master.detach()
            tensors.update({f"{key}.{name}": value for key, value in self.moments.get(name, {}).items()})
        tensors.update({f"muon.{name}": buffer for name, buffer in self.muon.items()})
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], source: str | Path = "the optimizer state") -> None:
        """Copy saved tensors in; a missing, unexpected or misshapen one raises ``CheckpointError`` naming it."""
        from llmcore.checkpoints import copy_tensors

        copy_tensors(self.state_dict(), tensors, source)
