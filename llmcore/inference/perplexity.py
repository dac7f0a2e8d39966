"""How well a model foretells a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmcore.models import Transformer

_ROWS = 256  # of the logits at a time: with a vocabulary of 128k that many are 128 MiB in float32


class Perplexity(NamedTuple):
    """perplexity: exp(nll); nll: the mean negative log-likelihood of a token, in nats; num_tokens: how many counted."""

    perplexity: float
    nll: float
    num_tokens: int


@torch.inference_mode()
def perplexity(
    model: Transformer, tokens: Sequence[int], *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """The perplexity of a text, over windows that each begin `stride` tokens after the one before.

    A token counts once, in the first window that it is in: so with at least window - stride tokens before it, but for
    the first window. The text's first token does not count.

    Args:
        window: tokens that the model sees at once; None: 1024, or max_positions where that is less.
        stride: 1 to window - 1; None: half of the window.

    Raises:
        ValueError: for a text of fewer than 2 tokens, or a window or stride out of its range.
    """
    limit = math.inf if model.config.position == "none" else model.config.max_positions
    window = int(min(1024, limit)) if window is None else window
    if not isinstance(window, int) or not 2 <= window <= limit:
        raise ValueError(f"window is {window!r}; accepted: 2 to max_positions = {limit}")
    stride = max(window // 2, 1) if stride is None else stride
    if not isinstance(stride, int) or not 1 <= stride < window:
        raise ValueError(f"stride is {stride!r}; accepted: 1 to {window - 1}, below the window")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; accepted: 2 or more")
    device, total, scored = model.device, 0.0, 1
    ids = torch.tensor(list(tokens), device=device)
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        hidden = model(ids[None, begin:end]).hidden[0]
        for first in range(scored, end, _ROWS):
            last = min(first + _ROWS, end)
            logits = model.logits(hidden[first - 1 - begin : last - 1 - begin]).float()
            total += torch.nn.functional.cross_entropy(logits, ids[first:last], reduction="sum").item()
        scored = end
        if end == len(ids):
            break
    nll = total / (len(ids) - 1)
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, len(ids) - 1)
