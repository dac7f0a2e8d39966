"""From logits to tokens, with settings as a user gives them: None is off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from llmcore import ops


def check_sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> None:
    """Raises a ValueError that names the first value out of its range."""
    for name, value, good, accepted in (
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or above"),
        ("top_k", top_k, top_k is None or (isinstance(top_k, Integral) and top_k >= 1), "1 or more, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, to 1, or None"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "0 to 1, or None"),
    ):
        if not good:
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


@dataclass(frozen=True)
class Penalties:
    """What tokens that were seen are punished with: see `llmcore.ops.apply_penalties_`. Raises a ValueError that names
    the first value out of its range."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        for name, accepted in (("repetition", "above 0"), ("presence", "a number"), ("frequency", "a number")):
            value = getattr(self, name)
            good = isinstance(value, Real) and math.isfinite(value) and (name != "repetition" or value > 0)
            if not good:
                raise ValueError(f"{name}_penalty is {value!r}; accepted: {accepted}")

    @property
    def on(self) -> bool:
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)

    def apply(self, logits: Tensor, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Tensor:
        """The logits (batch, vocab) after the penalties for each row's prompt and output; `logits` stays as it is."""
        seen = [[*prompt, *output] for prompt, output in zip(prompts, outputs)]
        longest = max(map(len, seen))
        tokens = torch.tensor([row + [-1] * (longest - len(row)) for row in seen], device=logits.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=logits.device)
        logits = logits.clone()
        ops.apply_penalties_(
            logits, tokens, lengths,
            repetition=float(self.repetition), presence=float(self.presence), frequency=float(self.frequency),
        )  # fmt: skip
        return logits


def draw(
    logits: Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[list[int], list[float]]:
    """Draws one token per row: `llmcore.ops.sample`, which says what the settings do. Gives the tokens and their log
    probabilities under the softmax of the logits.

    Args:
        logits: (batch, vocab).
        seeds: one per row, -2^63 to 2^64 - 1; those from 2^63 on are the same as that less 2^64.
        positions: one per row, such as the place of the token in its sequence. A seed gives each position noise of its
            own.

    Raises:
        ValueError: for a setting out of its range.
        RuntimeError: for a row of logits that holds NaN or +inf, or -inf only.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
    tokens, logprobs = ops.sample(
        logits,
        **_settings(temperature, top_k, top_p, min_p),
        seeds=torch.tensor(signed, device=logits.device),
        positions=torch.tensor(positions, device=logits.device),
    )
    tokens = tokens.tolist()
    if -1 in tokens:  # on a GPU the op itself does not look
        raise RuntimeError(
            f"the logits of row {tokens.index(-1)} hold NaN or +inf, or are all -inf; accepted: finite logits, and "
            "-inf beside a finite one"
        )
    return tokens, logprobs.tolist()


def probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The distribution that `draw` draws from: (batch, vocab) float64, each row summing to 1. Raises as `draw`."""
    check_sampling(temperature, top_k, top_p, min_p)
    return ops.sampling_probabilities(logits, **_settings(temperature, top_k, top_p, min_p))


def _settings(temperature, top_k, top_p, min_p) -> dict[str, float]:
    return {
        "temperature": float(temperature),
        "top_k": int(top_k or 0),
        "top_p": 1.0 if top_p is None else float(top_p),
        "min_p": 0.0 if min_p is None else float(min_p),
    }
