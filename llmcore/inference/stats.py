"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """waiting, running: sequences now; blocks_used: of `blocks_total` cache blocks those that sequences hold now.
    Since the engine was made: prefix_tokens_queried, of sequences that began; prefix_tokens_hit, of these what the
    cache held already; preemptions; tokens_generated; tokens_prefilled, those run before a first (or, after a
    preemption, a next) token could be drawn; draft_tokens, and of these draft_tokens_accepted."""

    waiting: int
    running: int
    blocks_used: int
    blocks_total: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int
    preemptions: int
    tokens_generated: int
    tokens_prefilled: int
    draft_tokens: int
    draft_tokens_accepted: int
