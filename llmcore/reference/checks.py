"""What the references refuse: shapes that would broadcast into another meaning, and indices that would wrap around."""

from __future__ import annotations

from torch import Tensor


def check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def check_shape(what: str, t: Tensor, *shape: int) -> None:
    check(tuple(t.shape) == shape, f"{what} has shape {tuple(t.shape)}; expected {shape}")


def check_indices(what: str, t: Tensor, low: int, high: int) -> None:
    outside = (t < low) | (t >= high)
    if outside.any():
        raise RuntimeError(f"{what} holds {t[outside][0].item()}; accepted: {low} to {high - 1}")


def check_offsets(what: str, offsets: Tensor, count: int, total: int) -> list[int]:
    """The values of `count` + 1 offsets that rise from 0 to `total`."""
    check_shape(what, offsets, count + 1)
    values = offsets.tolist()
    check(
        values[0] == 0 and values[-1] == total and values == sorted(values),
        f"{what} is {values}; expected offsets that start with 0, do not fall and end with {total}",
    )
    return values
