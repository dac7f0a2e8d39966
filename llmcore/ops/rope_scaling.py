"""Rotary frequencies for texts longer than those a model was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are lowered, so that `factor` times longer texts stay in the range of
    angles seen in training.

    Attributes:
        kind: "linear": all frequencies are divided by factor (arXiv 2306.15595). "llama3": only those whose wavelength
            is above original_max_positions / low_freq_factor; none below original_max_positions / high_freq_factor; a
            linear mix between (Llama 3.1, arXiv 2407.21783). "yarn": none that turn beta_fast times and more within
            original_max_positions, all that turn at most beta_slow times, a ramp over the dimensions between; and cos
            and sin are multiplied by an amplitude (arXiv 2309.00071).
        factor: how much longer texts become.
        original_max_positions: the length of the training; "linear" needs none.
        low_freq_factor, high_freq_factor: of "llama3".
        beta_fast, beta_slow: of "yarn", in turns.
        truncate: the ramp's ends are rounded outwards to whole dimensions ("yarn").
        attention_factor: the amplitude ("yarn"); None: 0.1 ln(factor) + 1, or with mscale and mscale_all_dim
            (DeepSeek-V2, arXiv 2405.04434) the quotient of 0.1 m ln(factor) + 1 for the two.
        mscale, mscale_all_dim: see attention_factor.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling.kind is {self.kind!r}; accepted: 'linear', 'llama3', 'yarn'")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rope_scaling.{name} is {getattr(self, name)!r}; accepted: above 0")
        if self.kind != "linear" and not (self.original_max_positions or 0) > 0:
            raise ValueError(
                f"rope_scaling.original_max_positions is {self.original_max_positions!r}; accepted with {self.kind!r}: "
                "1 or more"
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}; accepted: below high_freq_factor = "
                f"{self.high_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """The factor on cos and sin."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def magnitude(self, mscale: float) -> float:
        """0.1 mscale ln(factor) + 1: what "yarn" multiplies the logits' factors by."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def apply(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """(the lowered frequencies, the factor on cos and sin) for frequencies (rotary_dim / 2,) falling from 1."""
        if self.kind == "linear":
            return frequencies / self.factor, 1.0
        if self.kind == "llama3":
            turns = self.original_max_positions * frequencies / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            low, high = self._ramp(2 * len(frequencies), base)
            kept = 1 - (torch.arange(len(frequencies), dtype=frequencies.dtype) - low) / (high - low)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), self.amplitude

    def _ramp(self, rotary_dim: int, base: float) -> tuple[float, float]:
        """The pairs of dimensions between which YaRN's ramp falls."""

        def pair(turns: float) -> float:  # the pair that turns so often within the original length
            return rotary_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        return low, high if high != low else high + 0.001  # a step is a steep ramp
