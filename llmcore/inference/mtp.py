"""Speculative decoding by a model's own multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Sized
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.draw import Row, draw_tokens
from llmcore.inference.sequence import Sequence
from llmcore.inference.speculation import DraftCache, Speculator
from llmcore.models import Transformer

if TYPE_CHECKING:
    from llmcore.inference.scheduler import Work


@dataclasses.dataclass
class _Seen:
    """Of one text: the module has run positions `begin` to `end` - 1, and `hidden` are the model's hidden states of
    those from `end` on."""

    begin: int
    end: int
    hidden: Tensor


class _Part(NamedTuple):
    """What the module runs of a text: hidden states, (count, dim), and the token after each."""

    sequence: Sequence
    hidden: Tensor
    tokens: list[int]


class MTPSpeculator(Speculator):
    """Drafts by the model's first multi-token-prediction module, one more layer: from the hidden state of a token and
    the token after it, the one after that. Each further draft is made by the same module from its own last state,
    so they are right less and less often; the published models were trained for one.

    The module's keys and values are in a cache of its own. The hidden states of a prefix that the engine's cache held
    already are not known: there the module begins behind it, and sees less.

    Args:
        cache_tokens: room for keys and values of that one layer; None: `max_batch` of the model's longest sequences,
            but no more than 65536 tokens.
        num_tokens, limits: see `Speculator`.
    """

    needs_hidden = True
    KEEP = 64  # hidden states of a text that wait to be run: more are not kept

    def __init__(
        self, num_tokens: int = 1, *, cache_tokens: int | None = None, block_size: int = 16, **limits: int
    ) -> None:
        super().__init__(num_tokens, **limits)
        self._cache_tokens, self._block_size = cache_tokens, block_size
        self._seen: dict[int, _Seen] = {}

    def attach(self, model: Transformer) -> None:
        if not model.config.mtp_layers:
            raise ValueError("mtp_layers is 0; accepted: a model with multi-token prediction")
        super().attach(model)
        tokens = self._cache_tokens or min(self.max_batch * model.config.max_positions, 65536)
        config = dataclasses.replace(
            model.config, num_layers=1, mtp_layers=0, moe=None, window_layers=None, no_rope_layers=()
        )
        self.cache = PagedKVCache(
            config, PagedKVCache.blocks_for(tokens, self._block_size), block_size=self._block_size, dtype=model.dtype,
            device=model.device,
        )  # fmt: skip
        self._room, self._module = DraftCache(self.cache), model.mtp[0]

    # ---- what the model does

    def observe(self, work: Sized[Work], hidden: Tensor) -> None:
        begin = 0
        for w in work:
            self._keep(w.sequence, w.sequence.computed, hidden[begin : begin + w.tokens])
            begin += w.tokens
        long = [w.sequence for w in work if len(self._seen[w.sequence.id].hidden) > self.KEEP]
        self._run([part for s in long if (part := self._part(s)) is not None])
        for w in work:
            for sibling in w.siblings if w.sequence.id in self._seen else ():
                self._seen[sibling.id] = dataclasses.replace(self._seen[w.sequence.id])
                if w.sequence.id in self.cache:
                    self.cache.fork(w.sequence.id, sibling.id)

    def _keep(self, sequence: Sequence, begin: int, rows: Tensor) -> None:
        """Keeps the hidden states of the tokens from position `begin` on."""
        seen = self._seen.get(sequence.id)
        if seen is not None:  # those after drafts that were wrong are no use
            seen.hidden = seen.hidden[: max(0, len(sequence.tokens) - 1 - seen.end)]
        if seen is None or begin > seen.end + len(seen.hidden):
            self._room.release(sequence.id)
            self._seen[sequence.id] = _Seen(begin, begin, rows.clone())
            return
        new = rows[seen.end + len(seen.hidden) - begin :]  # a preempted text runs anew
        seen.hidden = torch.cat((seen.hidden, new))

    def release(self, sequence: Sequence) -> None:
        self._room.release(sequence.id)
        self._seen.pop(sequence.id, None)

    # ---- what the module does

    def _part(self, sequence: Sequence) -> _Part | None:
        """What is to be run of a text: all hidden states of which the next token is known."""
        seen = self._seen.get(sequence.id)
        count = 0 if seen is None else min(len(seen.hidden), len(sequence.tokens) - 1 - seen.end)
        if count <= 0:
            return None
        return _Part(sequence, seen.hidden[:count], sequence.tokens[seen.end + 1 :][:count])

    def _run(self, parts: list[_Part], further: int = 0) -> tuple[list[_Part], Tensor | None, Tensor | None]:
        """Runs the module on parts of texts, in whose cache there is to be room for `further` tokens of each. Gives the
        parts that there was room for, and of the last token of each the state for the logits and the stream."""
        without = self._room.make_room([(p.sequence.id, len(p.tokens) + further) for p in parts])
        for sequence in without:
            del self._seen[sequence]
        parts = [p for p in parts if p.sequence.id not in without]
        if not parts:
            return [], None, None
        states, streams = self._forward(parts)
        for p in parts:
            seen = self._seen[p.sequence.id]
            seen.end += len(p.tokens)
            seen.hidden = seen.hidden[len(p.tokens) :].clone()
        return parts, states, streams

    def _forward(self, parts: list[_Part]) -> tuple[Tensor, Tensor]:
        model, counts = self._model, [len(p.tokens) for p in parts]
        begins = [self._seen[p.sequence.id].begin for p in parts]
        step = self.cache.extend([p.sequence.id for p in parts], counts)
        device = self.cache.device
        offsets = torch.repeat_interleave(torch.tensor(begins), torch.tensor(counts)).to(device)
        layers = [None] * model.config.num_layers  # the module takes itself for the layer after the model's last
        step = dataclasses.replace(step, k_caches=[*layers, *step.k_caches], v_caches=[*layers, *step.v_caches])
        tokens = torch.tensor([token for p in parts for token in p.tokens], device=device)
        state, stream, _ = self._module(
            torch.cat([p.hidden for p in parts]), model.embed_tokens(tokens), rope=model.rope,
            positions=step.positions + offsets, cu_seqlens=None, cache=step,
        )  # fmt: skip
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        return state[last], stream[last]

    @torch.inference_mode()
    def draft(self, sequences: Sized[Sequence], counts: Sized[int]) -> list[list[int]]:
        drafts: dict[Sequence, list[int]] = {s: [] for s in sequences}
        wanted = dict(zip(sequences, counts))
        parts = [part for s in sequences if wanted[s] > 0 and (part := self._part(s)) is not None]
        parts, states, streams = self._run(parts, further=self.num_tokens)
        ends = {p.sequence.id: self.cache.length(p.sequence.id) for p in parts}
        place = 0
        while parts:
            if place:
                states, streams = self._forward(parts)
            for p in parts:
                p.sequence.drafts = drafts[p.sequence]
            tokens = draw_tokens(self._model.logits(states), [Row(p.sequence, place, i) for i, p in enumerate(parts)])
            place += 1
            following = []
            for p, token, stream in zip(parts, tokens, streams):
                if token is not None:
                    drafts[p.sequence].append(token)
                    if place < wanted[p.sequence]:
                        following.append(_Part(p.sequence, stream[None], [token]))
            parts = following
        for sequence, end in ends.items():  # what was run of drafts was run with states that were guesses too
            self.cache.truncate(sequence, end)
        return list(drafts.values())
