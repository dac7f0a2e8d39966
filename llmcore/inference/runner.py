"""One step on the device: tokens through the model, logits to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Sized
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore.inference.adapters import Adapter, applied
from llmcore.inference.cache import PagedKVCache
from llmcore.inference.decode_graph import DecodeGraph, can_capture
from llmcore.inference.decoder import Decoder, can_decode
from llmcore.inference.draw import Row, draw_rows, token_logprobs
from llmcore.inference.scheduler import Work
from llmcore.inference.sequence import Sequence, TokenLogprob
from llmcore.layers import CacheStep
from llmcore.models import Transformer

_PROMPT_ROWS = 256  # of logits at a time: with a vocabulary of 128k that many are 128 MiB in float32


class Drawn(NamedTuple):
    """What a step gave a sequence: a token after its own, and one after each draft that was right; and
    log-probabilities where they were asked for. `failed`: its logits were no numbers."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[TokenLogprob] | None = None
    failed: bool = False


class Runner:
    """Runs what the scheduler planned.

    Args:
        batch_invariant: every token goes through the model as a row of its own, by kernels that treat rows alike
            whatever is beside them: a request's bits are the same in every batch. Models that `Decoder` serves run up
            to 32 tokens at a time then, all others one. Prompts are slower.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache, *, batch_invariant: bool = False) -> None:
        self.model, self.cache, self.batch_invariant = model, cache, batch_invariant
        self._decoder = Decoder(model, cache) if can_decode(model) else None
        self._graphs = DecodeGraphs(model, cache) if can_capture(model) and not batch_invariant else None
        self._rows_at_once = Decoder.MAX_TOKENS if self._decoder is not None else 1  # where bits must not change
        self.observe: Callable[[list[Work], Tensor], None] | None = None  # told the hidden states of each step

    @torch.inference_mode()  # unlike no_grad, ops then skip their autograd layer: 3 us a call
    def run(self, work: list[Work]) -> dict[Sequence, Drawn]:
        """Runs a step. What was drawn for each sequence and its siblings, nothing where a prompt goes on."""
        rows, wanted = _rows(work)
        told: dict[Sequence, list[TokenLogprob]] = {}
        adapters = [w.sequence.request.adapter for w in work]
        adapters = adapters if any(a is not None for a in adapters) else None
        plain = self.observe is None and adapters is None
        if self._graphs is not None and plain and all(w.tokens == 1 and w.draws for w in work):
            sequences = [w.sequence for w in work]
            logits = self._graphs.logits([s.id for s in sequences], [s.tokens[-1] for s in sequences])
        else:
            new: list[int] = []
            for sequence, count, *_ in work:
                new += sequence.tokens[sequence.computed : sequence.computed + count]
                new += sequence.drafts
            hidden = self._hidden([w.sequence.id for w in work], [w.tokens for w in work], new, adapters)
            if self.observe is not None:
                self.observe(work, hidden)
            told = self._prompt_logprobs(hidden, work)
            logits = self._logits(hidden, wanted) if wanted else None
        drawn = _draw(logits, rows) if rows else {}
        for sequence, logprobs in told.items():
            drawn[sequence] = drawn.get(sequence, Drawn([], []))._replace(prompt_logprobs=logprobs)
        return drawn

    def last_logits(self, sequences: list[int], parts: list[list[int]]) -> Tensor:
        """Extends each sequence in the cache by its tokens. Gives the logits after the last, (sequences, vocab)."""
        counts = [len(part) for part in parts]
        if self._graphs is not None and max(counts) == 1:
            return self._graphs.logits(sequences, [part[0] for part in parts])
        hidden = self._hidden(sequences, counts, list(itertools.chain.from_iterable(parts)))
        return self._logits(hidden, [end - 1 for end in itertools.accumulate(counts)])

    def _hidden(
        self, sequences: list[int], counts: list[int], new: list[int], adapters: list[Adapter | None] | None = None
    ) -> Tensor:
        """Runs `counts[i]` tokens of each sequence, which are in `new` one after another. Gives (tokens, dim)."""
        step = self.cache.extend(sequences, counts)
        tokens = torch.tensor(new, device=self.cache.device)
        of_token = None
        if adapters is not None:
            of_token = [adapter for adapter, count in zip(adapters, counts) for _ in range(count)]
        if self.batch_invariant:
            return self._row_by_row(tokens, step, counts, of_token)
        return self._model(tokens, step, of_token)

    def _model(self, tokens: Tensor, step: CacheStep, adapters: list[Adapter | None] | None) -> Tensor:
        if adapters is not None:  # the decoder knows only the model's own weights
            with applied(self.model, adapters):
                return self.model(tokens, cache=step).hidden
        if self._decoder is not None and len(tokens) <= self._decoder.MAX_TOKENS:
            return self._decoder.hidden(tokens, step)
        return self.model(tokens, cache=step).hidden

    def _row_by_row(
        self, tokens: Tensor, step: CacheStep, counts: list[int], adapters: list[Adapter | None] | None
    ) -> Tensor:
        """Each token as a sequence that ends with it."""
        of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(tokens.device)
        lengths = (step.positions + 1).int()
        hidden = []
        for part in torch.arange(len(tokens), device=tokens.device).split(self._rows_at_once):
            table = step.block_table[of_row[part]]
            if self._decoder is None:  # as wide as it would be alone
                table = table[:, : self.cache.blocks_for(int(lengths[part].max()), self.cache.block_size)].contiguous()
            rows = CacheStep(
                step.k_caches, step.v_caches, step.slot_mapping[part], table, lengths[part], step.positions[part], None,
                step.k_scales, step.v_scales,
            )  # fmt: skip
            mine = adapters and adapters[int(part[0]) : int(part[-1]) + 1]
            hidden.append(self._model(tokens[part], rows, mine if mine and any(mine) else None))
        return torch.cat(hidden)

    def _logits(self, hidden: Tensor, rows: Sized[int]) -> Tensor:
        if len(rows) < hidden.shape[0]:
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        if self.batch_invariant:
            return torch.cat([self.model.logits(part) for part in hidden.split(self._rows_at_once)])
        return self.model.logits(hidden)

    def _prompt_logprobs(self, hidden: Tensor, work: list[Work]) -> dict[Sequence, list[TokenLogprob]]:
        """What each part of a prompt that was run tells of the prompt's tokens after it."""
        told: dict[Sequence, list[TokenLogprob]] = {}
        begin = 0
        for w in work:
            sequence = w.sequence
            if sequence.wants_prompt_logprobs:
                following = sequence.tokens[sequence.computed + 1 : sequence.request.prompt_len][: w.count]
                told[sequence] = []
                for at in range(0, len(following), _PROMPT_ROWS):
                    tokens = following[at : at + _PROMPT_ROWS]
                    logits = self._logits(hidden, range(begin + at, begin + at + len(tokens)))
                    told[sequence] += token_logprobs(logits, tokens, sequence.params.prompt_logprobs)
            begin += w.tokens
        return told


def _rows(work: list[Work]) -> tuple[list[Row], list[int]]:
    """The rows of logits to draw from, and the tokens of the step that they come after."""
    rows: list[Row] = []
    wanted: list[int] = []
    begin = 0
    for w in work:
        sequence = w.sequence
        if w.draws:
            rows.append(Row(sequence, 0, len(wanted)))
            rows += [Row(sibling, 0, len(wanted)) for sibling in w.siblings]
            rows += [Row(sequence, 1 + j, len(wanted) + 1 + j) for j in range(len(sequence.drafts))]
            last = begin + w.count - 1
            wanted += range(last, last + 1 + len(sequence.drafts))
        begin += w.tokens
    return rows, wanted


def _draw(logits: Tensor, rows: list[Row]) -> dict[Sequence, Drawn]:
    """A token for each row, and of each sequence those up to the first draft that was wrong."""
    if len(rows) != logits.shape[0]:  # siblings draw from one row
        logits = logits[torch.tensor([row.at for row in rows], device=logits.device)]
    tokens, logprobs = draw_rows(logits, rows)
    result: dict[Sequence, Drawn] = {}
    right = False
    for (sequence, drafts, _), token, logprob in zip(rows, tokens, logprobs):
        if drafts == 0:
            drawn = result[sequence] = Drawn([], [], failed=token is None)
        elif token is None or not right:  # a row that failed may be right when its turn comes
            right = False
            continue
        if token is not None:
            drawn.tokens.append(token)
            drawn.logprobs.append(logprob)
        right = drafts < len(sequence.drafts) and token == sequence.drafts[drafts]
    return result


class DecodeGraphs:
    """A `DecodeGraph` for each power of two of running sequences and of their blocks, made when it is first needed."""

    _MIN_BLOCKS = 16

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self._model, self._cache = model, cache
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def logits(self, sequences: list[int], tokens: list[int]) -> Tensor:
        size = 1 << (len(sequences) - 1).bit_length()
        longest = max(self._cache.length(s) for s in sequences) + 1
        blocks = self._cache.blocks_for(longest, self._cache.block_size)
        blocks = max(self._MIN_BLOCKS, 1 << (blocks - 1).bit_length())
        if (size, blocks) not in self._graphs:
            self._graphs[size, blocks] = DecodeGraph(self._model, self._cache, size, blocks, self._pool)
        return self._graphs[size, blocks].logits(sequences, tokens)
