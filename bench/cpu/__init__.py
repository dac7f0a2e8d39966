"""The CPU's table: one module per family of kernels, each with `rows() -> Iterator[Row]`. Run bench/cpu_table.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kernel, case, dtype, direction: its name; direction is "forward", "forward+backward" or "step".
        calls: name -> what is timed, without arguments; "llmcore" and its peers.
        check: raises AssertionError unless the calls' results agree; run before anything is timed.
        must, aim: peer -> how many times llmcore's speed must be its.
        work: what one call does: floating-point operations with a GEMM ceiling, bytes with a memory ceiling.
        ceiling: a key of `bench.compare.ceilings`, or "" when none binds.
        must_share, aim_share: of the ceiling; None when not asked for.
        notes: other figures by name, such as bytes of peak memory, from a call that is not timed.
    """

    kernel: str
    case: str
    dtype: str
    direction: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[], None]
    must: dict[str, float] = field(default_factory=dict)
    aim: dict[str, float] = field(default_factory=dict)
    work: float = 0.0
    ceiling: str = ""
    must_share: float | None = None
    aim_share: float | None = None
    notes: Callable[[], dict[str, float]] | None = None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_close(what: str, got: Tensor, want: Tensor, limit: float) -> None:
    """Relative error in the Frobenius norm."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    assert error <= limit, f"{what} is off by {error:.1e}; accepted: {limit:g}"
