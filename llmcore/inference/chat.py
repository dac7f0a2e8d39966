"""Prompts that are too long for the context: refused, or cut at their beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def fit_text(ids: list[int], limit: int | None, context: str, keep: int = 0) -> list[int]:
    """At most `limit` tokens: with context "slide" the first `keep` and the last of `ids`.

    Raises:
        ValueError: when they are more and context is "refuse", or the limit leaves no token.
    """
    if limit is None or len(ids) <= limit:
        return ids
    if context == "refuse" or limit <= keep:
        raise _too_long(len(ids), limit)
    return ids[:keep] + ids[len(ids) - (limit - keep) :]


def fit_chat(
    encode: Callable[[Sequence[Mapping[str, Any]]], list[int]],
    messages: Sequence[Mapping[str, Any]],
    limit: int | None,
    context: str,
) -> list[int]:
    """The chat's tokens, at most `limit`: with context "slide" without its oldest turns, where a turn is a user's
    message and what follows it. System messages at the beginning and the last turn stay.

    Raises:
        ValueError: when they are more and context is "refuse", or the last turn alone is too long.
    """
    messages = list(messages)
    ids = encode(messages)
    while limit is not None and len(ids) > limit:
        shorter = without_oldest_turn(messages) if context == "slide" else None
        if shorter is None:
            raise _too_long(len(ids), limit)
        messages = shorter
        ids = encode(messages)
    return ids


def without_oldest_turn(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The messages less their oldest turn; None when only one is left."""
    system = next((i for i, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    starts = [i for i in range(system + 1, len(messages)) if messages[i].get("role") == "user"]
    return [*messages[:system], *messages[starts[0] :]] if starts else None


def _too_long(count: int, limit: int) -> ValueError:
    return ValueError(
        f"the prompt has {count} tokens; accepted: {max(limit, 0)}, which is what max_tokens leaves of the context"
    )
