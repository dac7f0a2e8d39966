"""Speculative decoding (arXiv 2211.17192): something cheap guesses the next tokens of a text, and the model checks them
all in one step, which takes little longer than a step for one token.

Texts are the same as without. A token is drawn as the winner of a race, in which each token's time is noise divided by
its probability, and the noise is a function of the request's seed and the token's place alone (`llmcore.ops.sample`).
So what the model would draw after each draft is known before anything is accepted: drafts are right up to the first
that differs from it. A speculator that has logits of its own draws its drafts with the same noise. Two races over the
same noise often have the same winner (Gumbel coupling, arXiv 2408.07978): with total variation d between the two
distributions, with a probability of at least (1 - d) / (1 + d).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Sized
from typing import TYPE_CHECKING

import torch

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.constraints import GrammarMatcher
from llmcore.inference.draw import Row, draw_tokens
from llmcore.inference.runner import Runner
from llmcore.inference.sequence import Sequence
from llmcore.models import Transformer

if TYPE_CHECKING:
    from torch import Tensor

    from llmcore.inference.scheduler import Work

MAX_ROWS = 32  # of a step: up to here matrix products read each weight once, whatever the rows (docs/cpu-linear.md)


class Speculator:
    """Guesses what follows. A subclass writes `draft`; the other methods are hooks. One serves one engine.

    Where many texts are written at once a step is no longer bound by reading weights, and rows for drafts are paid for
    like any others; so the more texts, the fewer drafts, and above `max_batch` none.

    Args:
        num_tokens: drafts of a text and step, at most.
        max_batch: texts; with more being written nothing is drafted.
        max_rows: tokens of a step, drafts among them, that drafts may fill it to.
    """

    needs_hidden = False  # whether `observe` is to be called

    def __init__(self, num_tokens: int = 4, *, max_batch: int = 8, max_rows: int = MAX_ROWS) -> None:
        for name, value in (("num_tokens", num_tokens), ("max_batch", max_batch), ("max_rows", max_rows)):
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: 1 or more")
        self.num_tokens, self.max_batch, self.max_rows = num_tokens, max_batch, max_rows
        self._model: Transformer | None = None

    def attach(self, model: Transformer) -> None:
        """Called once, by the engine. Raises ValueError for a model whose texts it cannot guess."""
        if self._model is not None:
            raise ValueError("this speculator serves another engine; accepted: one of its own")
        self._model = model

    def propose(self, sequences: Sized[Sequence], counts: Sized[int]) -> list[list[int]]:
        """Up to `counts[i]` drafts of what follows `sequences[i]`, all of whose tokens but the last have been run."""
        if not sequences or len(sequences) > self.max_batch:
            return [[] for _ in sequences]
        share = min(self.num_tokens, self.max_rows // len(sequences) - 1)
        counts = [max(0, min(count, share)) for count in counts]
        return [self._allowed(s, drafts) for s, drafts in zip(sequences, self.draft(sequences, counts))]

    def _allowed(self, sequence: Sequence, drafts: list[int]) -> list[int]:
        return drafts[: sequence.matcher.valid(drafts)] if isinstance(sequence.matcher, GrammarMatcher) else drafts

    def draft(self, sequences: Sized[Sequence], counts: Sized[int]) -> list[list[int]]:
        raise NotImplementedError

    def observe(self, work: Sized[Work], hidden: Tensor) -> None:
        """Sees each step before tokens are drawn: `hidden`, (tokens, dim), after the model's last norm."""

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence, which has ended."""


class NGramSpeculator(Speculator):
    """Prompt lookup: looks for the text's last tokens earlier in it, the most of them that occur, and guesses that what
    followed will follow again (arXiv 2304.04487). Costs nothing where a text quotes itself: code, summaries, chats.

    Args:
        min_match, max_match: how many of the last tokens must occur, and how many at most are looked for.
    """

    def __init__(self, num_tokens: int = 4, *, min_match: int = 2, max_match: int = 4, **limits: int) -> None:
        super().__init__(num_tokens, **limits)
        if not 1 <= min_match <= max_match:
            raise ValueError(f"min_match is {min_match}, max_match {max_match}; accepted: 1 or more, and no less")
        self.min_match, self.max_match = min_match, max_match

    def draft(self, sequences: Sized[Sequence], counts: Sized[int]) -> list[list[int]]:
        return [self._find(s.tokens, count) if count else [] for s, count in zip(sequences, counts)]

    def _find(self, tokens: list[int], count: int) -> list[int]:
        packed = array("i", tokens)
        size, text = packed.itemsize, packed.tobytes()
        for length in range(min(self.max_match, len(tokens) - 1), self.min_match - 1, -1):
            last, end = text[-length * size :], len(text) - size  # the match may overlap the tokens it is for
            while (at := text.rfind(last, 0, end)) >= 0:
                if at % size == 0:
                    begin = at // size + length
                    return tokens[begin : begin + count]
                end = at + len(last) - 1  # bytes of two tokens
        return []


class DraftCache:
    """A paged cache of a speculator: sequences give way to those that are drafted for, the least recent first."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._recent: dict[int, None] = {}  # in the order of their use

    def make_room(self, wanted: Sized[tuple[int, int]]) -> set[int]:
        """Makes room for more tokens of sequences: `wanted` are their numbers and counts. Gives those for which there
        is none."""
        cache, without = self.cache, set()
        for sequence, _ in wanted:
            self._recent.pop(sequence, None)
        self._recent |= dict.fromkeys(sequence for sequence, _ in wanted)
        wanted = list(wanted)
        while wanted and sum(cache.blocks_needed(*w) for w in wanted) > cache.num_free_blocks:
            oldest = next(iter(self._recent))
            if oldest in dict(wanted):
                oldest, _ = wanted.pop()
                without.add(oldest)
            self.release(oldest)
        return without

    def release(self, sequence: int) -> None:
        self._recent.pop(sequence, None)
        if sequence in self.cache:
            self.cache.release(sequence)


class DraftSpeculator(Speculator):
    """A smaller model of the same vocabulary writes the drafts, token by token, for all texts at once. It has a cache
    of its own, in which a text catches up when it is drafted for: after a rejection by a token or two, after preemption
    or where nothing was drafted for a while by more.

    Args:
        model: in evaluation mode from now on.
        cache_tokens: room for its keys and values; None: `max_batch` of its longest sequences, but no more than 65536
            tokens. Texts beyond it are drafted for in turns.
        num_tokens, limits: see `Speculator`.
    """

    CHUNK = 2048  # tokens of a prompt that are run at once

    def __init__(
        self, model: Transformer, num_tokens: int = 4, *, cache_tokens: int | None = None, block_size: int = 16,
        **limits: int,
    ) -> None:  # fmt: skip
        super().__init__(num_tokens, **limits)
        if cache_tokens is None:
            cache_tokens = min(self.max_batch * model.config.max_positions, 65536)
        blocks = PagedKVCache.blocks_for(cache_tokens, block_size)
        cache = PagedKVCache(model.config, blocks, block_size=block_size, dtype=model.cache_dtype, device=model.device)
        self.model, self.cache = model.eval(), cache
        self._room, self._runner = DraftCache(cache), Runner(model, cache)
        self._known: dict[int, tuple[int, list[int]]] = {}  # tokens of the text that were run, and drafts after them

    def attach(self, model: Transformer) -> None:
        super().attach(model)
        ours, theirs = self.model.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise ValueError(f"the draft model has {ours} tokens; accepted: the model's vocabulary, of {theirs}")

    @torch.inference_mode()
    def draft(self, sequences: Sized[Sequence], counts: Sized[int]) -> list[list[int]]:
        wanted = {s: min(c, self.model.config.max_positions - len(s.tokens)) for s, c in zip(sequences, counts)}
        wanted = {s: count for s, count in wanted.items() if count > 0}
        parts = self._catch_up(wanted)
        drafts: dict[Sequence, list[int]] = {s: [] for s in sequences}
        for place in range(max(wanted.values(), default=0)):
            parts = {s: part for s, part in parts.items() if wanted[s] > place}
            if not parts:
                break
            logits = self._runner.last_logits([s.id for s in parts], list(parts.values()))
            if place == 0:
                for s in parts:
                    self.cache.publish(s.id, s.tokens[:-1])  # the last may have to be run again
            for s in parts:
                s.drafts = drafts[s]
            tokens = draw_tokens(logits, [Row(s, place, i) for i, s in enumerate(parts)])
            for s, token in zip(parts, tokens):
                if token is not None:
                    drafts[s].append(token)
            parts = {s: [token] for s, token in zip(parts, tokens) if token is not None}
        for s in wanted:
            if s.id in self.cache:
                self._known[s.id] = (len(s.tokens), list(drafts[s]))
        return list(drafts.values())

    def _catch_up(self, wanted: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """The tokens of each text that are to be run for its first draft."""
        begins = {s: self._agreed(s) for s in wanted}
        needed = [(s.id, len(s.tokens) - begins[s] + wanted[s] - 1) for s in wanted]
        without = self._room.make_room(needed)
        parts = {}
        for s, begin in begins.items():
            if s.id in without:
                self._known.pop(s.id, None)
                continue
            while len(s.tokens) - begin > self.CHUNK:
                self._runner.last_logits([s.id], [s.tokens[begin : begin + self.CHUNK]])
                begin += self.CHUNK
            parts[s] = s.tokens[begin:]
        return parts

    def _agreed(self, sequence: Sequence) -> int:
        """How many of a text's tokens the cache holds, less those that were drafts and turned out wrong."""
        if sequence.id not in self.cache:
            return self.cache.find_prefix(sequence.id, sequence.tokens)
        length, drafts = self._known[sequence.id]
        held = self.cache.length(sequence.id)
        for token, draft in zip(sequence.tokens[length:held], drafts):
            if token != draft:
                break
            length += 1
        length = min(length, len(sequence.tokens) - 1)  # where the drafts of the last time were not run
        self.cache.truncate(sequence.id, length)
        return length

    def release(self, sequence: Sequence) -> None:
        self._room.release(sequence.id)
        self._known.pop(sequence.id, None)
