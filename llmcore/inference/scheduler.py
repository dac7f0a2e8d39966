"""Which sequences run in the next step, and how many tokens of each: continuous batching (Orca, OSDI 2022) with chunked
prefill (Sarathi, arXiv 2308.16369) over a cache that may run out."""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.sequence import Sequence


class Work(NamedTuple):
    """Run the next `count` tokens of `sequence`, and after them its drafts. `siblings` are choices that begin when its
    prompt has been run."""

    sequence: Sequence
    count: int
    siblings: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        return self.count + len(self.sequence.drafts)

    @property
    def draws(self) -> bool:
        """Whether a token is drawn after it."""
        return self.count == self.sequence.remaining


class Scheduler:
    """First come, first served. Each step first continues the texts that are being written, then prompts that have been
    begun, then begins new ones while tokens and cache blocks suffice. When blocks run out, the sequence that came last
    gives its own back and waits at the head of the queue: nothing it has written is lost.

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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of their arrival
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child` run beside `parent`, whose prompt it shares."""
        self.cache.fork(parent.id, child.id)
        child.computed = parent.computed
        self.running.insert(self.running.index(parent) + 1, child)

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
        self._work: dict[Sequence, Work] = {}
        self._budget, self._planned = self.max_batch_tokens, 0
        preempted = False
        writing = [s for s in self.running if s.remaining == 1]
        reading = [s for s in self.running if s.remaining > 1]
        for sequence in writing + reading:
            if sequence in self.running and self._budget > 0:  # it may have been preempted meanwhile
                preempted |= self._continue(sequence)
        if not preempted:
            while self.waiting and self._budget > 0 and self._begin(self.waiting[0]):
                pass
        return list(self._work.values())

    def _continue(self, sequence: Sequence) -> bool:
        """Plans for a running sequence; whether another, or it itself, had to give way."""
        preempted = False
        count = min(sequence.remaining, self._budget)
        spare = self._budget - count if count == sequence.remaining else 0
        del sequence.drafts[spare:]
        while (needed := self._needed(sequence, count)) > self._free():
            preempted = True
            if sequence.drafts:
                sequence.drafts.clear()
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return True
        self._plan(Work(sequence, count), needed)
        return preempted

    def _begin(self, sequence: Sequence) -> bool:
        """Plans for the first of the waiting sequences, if there is room for all that it has."""
        if sum(1 + s.forks_to_come for s in [*self.running, sequence]) > self.max_sequences:
            return False
        if sequence.saved is not None:
            if self._needed(sequence, sequence.computed + 1) > self._free():
                return False
            self.cache.swap_in(sequence.id, sequence.saved)
            sequence.saved = None
        else:
            look = self.prefix_caching and sequence.params.prompt_logprobs is None
            found = self.cache.find_prefix(sequence.id, sequence.tokens if look else [0], sequence.request.salt)
            if self._needed(sequence, len(sequence.tokens) - found) > self._free():
                self.cache.release(sequence.id)
                return False
            sequence.computed = found
            if sequence.num_output == 0:
                sequence.request.cached_tokens = found
        self.waiting.popleft()
        self.running.append(sequence)
        count = min(sequence.remaining, self._budget)
        self._plan(Work(sequence, count), self._needed(sequence, count))
        return True

    def _needed(self, sequence: Sequence, count: int) -> int:
        return self.cache.blocks_needed(sequence.id, count + len(sequence.drafts))

    def _free(self) -> int:
        return self.cache.num_free_blocks - self._planned

    def _plan(self, work: Work, blocks: int) -> None:
        self._work[work.sequence] = work
        self._budget -= work.tokens
        self._planned += blocks

    def _preempt(self, sequence: Sequence) -> None:
        if work := self._work.pop(sequence, None):
            self._budget += work.tokens
            self._planned -= self._needed(sequence, work.count)
        self.running.remove(sequence)
        sequence.drafts.clear()
        if self.preemption == "swap" and sequence.computed > 0:
            sequence.saved = self.cache.swap_out(sequence.id)
        else:
            self.cache.release(sequence.id)
            sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
