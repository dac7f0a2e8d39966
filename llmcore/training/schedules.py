"""Learning-rate schedules: pure functions from training progress to a factor on the peak learning rate.

Progress runs from 0 (before the first step) to 1 (training is over), so one definition serves both a run of a fixed
number of steps and a run with a time budget: see :func:`progress`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """``warmup`` and ``decay`` are fractions of the run; ``floor`` is the final factor on the peak learning rate."""

    kind: str = "cosine"  # cosine | wsd | constant
    warmup: float = 0.02
    decay: float = 0.2  # used by wsd
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule.kind is {self.kind!r}; accepted are 'cosine', 'wsd' and 'constant'")
        for name in ("warmup", "decay", "floor"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"schedule.{name} is {value}; accepted is a fraction from 0 to 1")
        if self.kind == "wsd" and self.warmup + self.decay > 1.0:
            raise ValueError(f"schedule.warmup + schedule.decay is {self.warmup + self.decay}; at most 1 is accepted")


def progress(step: int, steps: int, elapsed: float = 0.0, max_seconds: float = 0.0) -> float:
    """How far a run is, in [0, 1], when it has taken ``step`` of ``steps`` steps and ``elapsed`` seconds.

    A run ends at whichever bound it meets first, so progress is the larger of the two ratios. A bound of 0 is absent.
    """
    by_steps = step / steps if steps else 0.0
    by_time = elapsed / max_seconds if max_seconds else 0.0
    return min(1.0, max(by_steps, by_time))


def cosine(p: float, *, warmup: float, floor: float) -> float:
    """Linear warm-up, then half a cosine from 1 down to ``floor`` at ``p == 1`` (SGDR, arXiv 1608.03983)."""
    if p < warmup:
        return p / warmup
    if warmup >= 1.0:
        return 1.0
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (p - warmup) / (1.0 - warmup)))


def warmup_stable_decay(p: float, *, warmup: float, decay: float, floor: float) -> float:
    """Linear warm-up, a plateau at 1, then a linear decay over the last ``decay`` of the run (arXiv 2404.06395)."""
    if p < warmup:
        return p / warmup
    if p <= 1.0 - decay or decay == 0.0:
        return 1.0
    return floor + (1.0 - floor) * (1.0 - p) / decay


def learning_rate_factor(p: float, config: ScheduleConfig) -> float:
    """The factor on the peak learning rate at progress ``p`` in [0, 1]."""
    if config.kind == "cosine":
        return cosine(p, warmup=config.warmup, floor=config.floor)
    if config.kind == "wsd":
        return warmup_stable_decay(p, warmup=config.warmup, decay=config.decay, floor=config.floor)
    return min(1.0, p / config.warmup) if config.warmup else 1.0
