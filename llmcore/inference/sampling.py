"""Settings of sampling as a user gives them: None is off."""

from __future__ import annotations

from numbers import Integral

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


def probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The distribution that tokens are drawn from: (batch, vocab) float64, each row summing to 1.

    Raises:
        ValueError: for a setting out of its range.
        RuntimeError: for a row of logits that holds NaN or +inf, or -inf only.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    return ops.sampling_probabilities(
        logits,
        temperature=float(temperature),
        top_k=int(top_k or 0),
        top_p=1.0 if top_p is None else float(top_p),
        min_p=float(min_p or 0),
    )
