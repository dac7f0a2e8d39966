"""A whole optimizer step for bench/gpu.py: clipping by the global norm and AdamW of a model of 1 B bf16 weights with
float32 masters, beside the same in torch (clip_grad_norm_, fused AdamW, a copy to the weights)."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from llmcore import ops

LR, BETAS, EPS, DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
# The matrices and norms of a decoder of 20 layers, hidden size 2048, and its table of 48,000 tokens.
LAYER = ((3072, 2048), (2048, 2048), (11264, 2048), (2048, 5632), (2048,), (2048,))
SHAPES = ((48_000, 2048), *LAYER * 20)


class Ours:
    def __init__(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        self.weights, self.grads = [w.clone() for w in weights], grads
        self.masters = [w.float() for w in weights]
        self.means, self.squares = ([torch.zeros_like(m) for m in self.masters] for _ in range(2))
        self.steps = [torch.zeros((), device=w.device) for w in weights]

    def step(self) -> None:
        state = (self.weights, self.masters, self.grads, self.means, self.squares, self.steps)
        numbers = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        ops.adamw_(*state, **numbers, norm=ops.global_norm(self.grads), max_norm=MAX_NORM)


class Torchs:
    def __init__(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        self.weights, self.grads = [w.clone() for w in weights], grads
        self.masters = [torch.nn.Parameter(w.float()) for w in weights]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        for master, grad in zip(self.masters, self.grads):
            master.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_NORM, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
        self.optimizer.zero_grad()


def check(ours: Ours, torchs: Torchs, before: list[Tensor]) -> None:
    """One step of both comes to the same moves and moments."""
    for i, (mine, theirs) in enumerate(zip(ours.masters, torchs.masters)):
        state = torchs.optimizer.state[theirs]
        start = before[i].float()
        pairs = {
            "update": (mine - start, theirs.detach() - start),
            "exp_avg": (ours.means[i], state["exp_avg"]),
            "exp_avg_sq": (ours.squares[i], state["exp_avg_sq"]),
        }
        for name, (got, want) in pairs.items():
            error = float((got - want).norm() / want.norm())
            # a master near 1 that moves by 1e-3 is rounded by up to 6e-5 of its move
            assert error <= 1e-4, f"{name} of tensor {i}, {tuple(mine.shape)}, is off by {error:.1e}"
        assert torch.equal(ours.weights[i], mine.bfloat16()), f"weights of tensor {i} are not its rounded master"


def label(count: int) -> str:
    return f"AdamW + clipping, {count / 1e9:.1f} B parameters"


def measure(
    rounds: int, microseconds: Callable[[Callable[[], None]], float], device: str = "cuda", shapes=SHAPES
) -> dict:
    """A row of bench/gpu.py."""
    make = torch.Generator(device).manual_seed(0)
    weights, grads = (
        [torch.randn(s, generator=make, device=device).mul_(0.02).bfloat16() for s in shapes] for _ in range(2)
    )
    both = {"llmcore": Ours(weights, grads), "torch": Torchs(weights, grads)}
    for implementation in both.values():
        implementation.step()
    check(both["llmcore"], both["torch"], weights)
    del weights
    times: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(rounds):
        for name in list(both) if turn % 2 else list(reversed(both)):
            times[name].append(microseconds(both[name].step))
    us = {name: statistics.median(t) for name, t in times.items()}
    count = sum(g.numel() for g in grads)
    return {
        "op": "optimizer",
        "case": label(count),
        "dtype": "bfloat16",
        "direction": "step",
        "us": us,
        "left_out": {},
        # gradients twice, for the norm and the update; master and moments read and written; weights written
        "gbytes": count * (2 + 2 + 24 + 2) / us["llmcore"] * 1e-3,
    }
