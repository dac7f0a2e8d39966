"""Which sequences run in the next step, and how many tokens of each: continuous batching (Orca, OSDI 2022) with chunked
prefill (Sarathi, arXiv 2308.16369) over a cache that may run out."""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.sequence import Sequence


class Work(NamedTuple):
    """Run the next `count` tokens of `sequence`, and after them its drafts; if they are all it has, a token is drawn.
    `siblings` are choices that begin when its prompt has been run."""

    sequence: Sequence
    count: int
    draws: bool
    siblings: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        return self.count + len(self.sequence.drafts)


class Scheduler:
    """First come, first served: sequences are ordered by when their request came, choices of one by their index.

    Sequences run in that order and begin in that order, none before the one ahead of it; when blocks run out, the last
    that runs gives its own back and is the first that waits. So those that run always come before all that wait. The
    first of all never gives way: it gets at least one token into each step, and since a request is taken in only where
    the cache holds its longest choice, it ends. Then the next is the first: everything ends, in at most as many steps
    as there are tokens in all, even where two choices of a request don't fit the cache together: they run one after
    another.

    Args:
        max_batch_tokens: tokens of a step; above max_sequences, so that prompts go on beside the texts.
        max_sequences: sequences that run at a time.
        preemption: what becomes of the keys and values of one that must wait: they are computed anew, or kept in main
            memory.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        preemption: Literal["recompute", "swap"] = "recompute",
        prefix_caching: bool = True,
    ) -> None:
        if max_sequences < 1 or max_batch_tokens <= max_sequences:
            raise ValueError(
                f"max_sequences is {max_sequences}, max_batch_tokens {max_batch_tokens}; accepted: 1 or more, and more "
                "than that"
            )
        if preemption not in ("recompute", "swap"):
            raise ValueError(f"preemption is {preemption!r}; accepted: 'recompute', 'swap'")
        self.cache, self.max_batch_tokens, self.max_sequences = cache, max_batch_tokens, max_sequences
        self.preemption, self.prefix_caching = preemption, prefix_caching
        self.waiting: deque[Sequence] = deque()  # both in the order of their arrival
        self.running: list[Sequence] = []
        self.num_preemptions = self.tokens_queried = self.tokens_hit = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child`, the next choice of the request, run beside `parent`, whose prompt it shares."""
        self.cache.fork(parent.id, child.id)
        child.computed = parent.computed
        self.running.insert(self.running.index(parent) + child.index - parent.index, child)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.saved = None

    def schedule(self) -> list[Work]:
        """The next step; empty when nothing waits or runs."""
        work: list[Work] = []
        # One token for each text that is being written; what is left is for prompts and drafts.
        self._spare = self.max_batch_tokens - sum(s.remaining == 1 for s in self.running)
        self._planned = 0  # blocks
        before = self.num_preemptions
        while len(work) < len(self.running):
            planned = self._continue(self.running[len(work)])
            if planned is None:
                break
            work.append(planned)
        work = [w for w in work if w.count]
        if self.num_preemptions == before and self.waiting and self._spare > 0:
            work += self._begin_waiting()
        return work

    def _continue(self, sequence: Sequence) -> Work | None:
        """Plans for a running sequence; those after it give way where blocks are lacking. None: it did itself."""
        remaining = sequence.remaining
        count = 1 if remaining == 1 else min(remaining, self._spare)
        taken = count if remaining > 1 else 0
        if sequence.drafts:
            del sequence.drafts[max(0, self._spare - taken) if count == remaining else 0 :]
        while (needed := self._needed(sequence, count)) > self.cache.num_free_blocks - self._planned:
            if sequence.drafts:
                sequence.drafts.clear()
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        self._planned += needed
        self._spare -= taken + len(sequence.drafts)
        return Work(sequence, count, count == remaining)

    def _begin_waiting(self) -> list[Work]:
        """Begins waiting sequences while there is room for all that each has, and for one more block of each text."""
        work: list[Work] = []
        self._choices = sum(1 + s.forks_to_come for s in self.running)
        self._outstanding = sum(self._needed(s, s.remaining) for s in self.running)  # blocks, with those planned
        while self.waiting and self._spare > 0:
            sequence = self.waiting[0]
            if not self._begin(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.remaining, self._spare)
            self._spare -= count
            work.append(Work(sequence, count, count == sequence.remaining))
        return work

    def _begin(self, sequence: Sequence) -> bool:
        """Brings a sequence into the cache, if there is room."""
        choices = self._choices + 1 + sequence.forks_to_come
        if choices > self.max_sequences:
            return False
        headroom = choices if self.running else 0  # one alone needs none: it has the whole cache
        others = self._outstanding + headroom
        if sequence.saved is not None:
            if self._needed(sequence, sequence.computed + sequence.remaining) > self.cache.num_free_blocks - others:
                return False
            self.cache.swap_in(sequence.id, sequence.saved)
            sequence.saved = None
        else:
            look = self.prefix_caching and not sequence.wants_prompt_logprobs
            known = sequence.tokens if look else []
            found = self.cache.find_prefix(sequence.id, known, sequence.request.salt)
            lacking = self._needed(sequence, len(sequence.tokens) - found) > self.cache.num_free_blocks - others
            if lacking or (look and self._is_being_run(sequence, found)):
                self.cache.release(sequence.id)
                return False
            sequence.computed = found
            self.tokens_queried += len(known)
            self.tokens_hit += found
            if sequence.num_output == 0:
                sequence.request.cached_tokens = found
        self._choices = choices
        self._outstanding += self._needed(sequence, sequence.remaining)
        return True

    def _is_being_run(self, sequence: Sequence, found: int) -> bool:
        """Whether another runs at least half of what the cache lacks of these tokens: it is soon found there."""
        size, tokens = self.cache.block_size, sequence.tokens
        half = found + -(-(len(tokens) - found) // (2 * size)) * size
        return half < len(tokens) and any(
            s.computed < half and s.request.salt == sequence.request.salt and s.tokens[:half] == tokens[:half]
            for s in self.running
        )

    def _needed(self, sequence: Sequence, count: int) -> int:
        count += len(sequence.drafts)
        return self.cache.blocks_needed(sequence.id, count) if count else 0

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.drafts.clear()
        if self.preemption == "swap" and sequence.computed > 0:
            sequence.saved = self.cache.swap_out(sequence.id)
        else:
            self.cache.release(sequence.id)
            sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
