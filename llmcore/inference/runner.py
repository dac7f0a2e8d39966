"""One step on the device: tokens through the model, logits to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Sized
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore import ops
from llmcore.inference.cache import PagedKVCache
from llmcore.inference.constraints import mask_logits_
from llmcore.inference.decode_graph import DecodeGraph, can_capture
from llmcore.inference.decoder import Decoder, can_decode
from llmcore.inference.scheduler import Work
from llmcore.inference.sequence import Sequence, TokenLogprob
from llmcore.layers import CacheStep
from llmcore.models import Transformer


class Row(NamedTuple):
    """A row of logits to draw from: it comes after the first `drafts` drafts of `sequence`, as row `at` of a step's."""

    sequence: Sequence
    drafts: int
    at: int


class Drawn(NamedTuple):
    """What a step gave a sequence: a token after its own, and one after each draft that was right; and
    log-probabilities where they were asked for. `failed`: its logits were no numbers."""

    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    failed: bool = False


class Runner:
    """Runs what the scheduler planned.

    Args:
        batch_invariant: every token goes through the model as a row of its own, by kernels that treat rows alike
            whatever is beside them: a request's bits are the same in every batch. On the CPU, for the models that
            `Decoder` serves. Prompts are slower.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache, *, batch_invariant: bool = False) -> None:
        self.model, self.cache, self.batch_invariant = model, cache, batch_invariant
        self._decoder = Decoder(model, cache) if can_decode(model) else None
        self._graphs = DecodeGraphs(model, cache) if can_capture(model) else None
        if batch_invariant and self._decoder is None:
            raise ValueError("batch_invariant is True; accepted for this model: False (llmcore.inference.Decoder)")

    @torch.inference_mode()
    def run(self, work: list[Work]) -> dict[Sequence, Drawn]:
        """Runs a step. What was drawn for each sequence and its siblings, nothing where a prompt goes on."""
        tokens = [w.sequence.tokens[w.sequence.computed :][: w.count] + w.sequence.drafts for w in work]
        wanted: list[int] = []  # rows of the step whose logits are needed
        rows: list[Row] = []
        prompts: dict[Sequence, range] = {}  # rows of logits that tell of the next token of the prompt
        begin = 0
        for w in work:
            last = begin + w.count - 1
            if w.sequence.params.prompt_logprobs is not None:
                prompts[w.sequence] = range(len(wanted), len(wanted) + w.count - w.draws)
                wanted += range(begin, last + (not w.draws))
            if w.draws:
                rows += [Row(sequence, 0, len(wanted)) for sequence in (w.sequence, *w.siblings)]
                rows += [Row(w.sequence, 1 + j, len(wanted) + 1 + j) for j in range(len(w.sequence.drafts))]
                wanted += range(last, last + 1 + len(w.sequence.drafts))
            begin += w.tokens
        logits = self._logits([w.sequence.id for w in work], tokens, wanted)
        drawn = self._draw(logits, rows) if rows else {}
        for sequence, places in prompts.items():
            following = sequence.tokens[sequence.computed + 1 :][: len(places)]
            if following:
                told = token_logprobs(logits[places.start : places.stop], following, sequence.params.prompt_logprobs)
                drawn[sequence] = drawn.get(sequence, Drawn())._replace(prompt_logprobs=told)
        return drawn

    def _draw(self, logits: Tensor, rows: list[Row]) -> dict[Sequence, Drawn]:
        at = [row.at for row in rows]
        if at != list(range(len(logits))):
            logits = logits[torch.tensor(at, device=logits.device)]
        result: dict[Sequence, Drawn] = {}
        of_sequence: dict[Sequence, list[int]] = {}
        for index, row in enumerate(rows):
            of_sequence.setdefault(row.sequence, []).append(index)
        tokens = draw_rows(logits, rows)
        for sequence, indices in of_sequence.items():
            taken: list[int] = []
            for index, draft in zip(indices, [*sequence.drafts, None]):
                if tokens[index] is None:  # after a draft it is the next step's matter, as without drafts
                    if not taken:
                        result[sequence] = Drawn(failed=True)
                    break
                taken.append(tokens[index])
                if tokens[index] != draft:
                    break
            if sequence not in result:
                logprobs = []
                if sequence.params.logprobs is not None:
                    mine = logits[torch.tensor(indices[: len(taken)], device=logits.device)]
                    logprobs = token_logprobs(mine, taken, sequence.params.logprobs)
                result[sequence] = Drawn(taken, logprobs)
        return result

    def _logits(self, ids: list[int], tokens: list[list[int]], rows: list[int]) -> Tensor | None:
        counts = [len(t) for t in tokens]
        if self._graphs is not None and all(count == 1 for count in counts):
            return self._graphs.logits(ids, [t[0] for t in tokens])
        step = self.cache.extend(ids, counts)
        packed = torch.tensor(list(itertools.chain.from_iterable(tokens)), device=self.cache.device)
        if self.batch_invariant:
            hidden = self._row_by_row(packed, step, counts)
        elif self._decoder is not None and len(packed) <= self._decoder.MAX_TOKENS:
            hidden = self._decoder.hidden(packed, step)
        else:
            hidden = self.model(packed, cache=step).hidden
        if not rows:
            return None
        if len(rows) < len(packed):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        if self.batch_invariant:
            return torch.cat([self.model.logits(part) for part in hidden.split(self._decoder.MAX_TOKENS)])
        return self.model.logits(hidden)

    def _row_by_row(self, packed: Tensor, step: CacheStep, counts: list[int]) -> Tensor:
        """Each token as a sequence that ends with it, in steps of as many as the decoder takes."""
        of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        lengths = (step.positions + 1).int()
        parts = []
        for part in torch.arange(len(packed)).split(self._decoder.MAX_TOKENS):
            rows = CacheStep(
                step.k_caches, step.v_caches, step.slot_mapping[part], step.block_table[of_row[part]], lengths[part],
                step.positions[part], None, step.k_scales, step.v_scales,
            )  # fmt: skip
            parts.append(self._decoder.hidden(packed[part], rows))
        return torch.cat(parts)


class DecodeGraphs:
    """A `DecodeGraph` for each power of two of running sequences, made when it is first needed."""

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self._model, self._cache = model, cache
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def logits(self, sequences: list[int], tokens: list[int]) -> Tensor:
        size = 1 << (len(sequences) - 1).bit_length()
        longest = max(self._cache.length(s) for s in sequences) + 1
        blocks = 1 << (self._cache.blocks_for(longest, self._cache.block_size) - 1).bit_length()
        if (size, blocks) not in self._graphs:
            self._graphs[size, blocks] = DecodeGraph(self._model, self._cache, size, blocks, self._pool)
        return self._graphs[size, blocks].logits(sequences, tokens)


def draw_rows(logits: Tensor, rows: Sized[Row]) -> list[int | None]:
    """A token for each row of logits; None for one that holds NaN or +inf, or nothing that may be drawn."""
    params = [row.sequence.params for row in rows]
    logits = _adjusted(logits, rows)
    settings = {
        "temperature": [p.temperature for p in params],
        "top_k": [p.top_k or 0 for p in params],
        "top_p": [1.0 if p.top_p is None else p.top_p for p in params],
        "min_p": [p.min_p or 0.0 for p in params],
        "seeds": [row.sequence.seed for row in rows],
        "positions": [len(row.sequence.tokens) + row.drafts for row in rows],
    }
    bad: list[bool] = [False] * len(rows)
    if logits.is_cpu:  # there the op raises for the whole batch
        top = logits.amax(dim=-1)
        if not bool(torch.isfinite(top).all()):
            bad = (~torch.isfinite(top)).tolist()
            logits = logits.clone()
            logits[torch.tensor(bad)] = 0
    given = {
        name: values[0] if len(set(values)) == 1 else torch.tensor(values, device=logits.device)
        for name, values in settings.items()
    }
    tokens, _ = ops.sample(logits, **given)
    return [None if wrong or token < 0 else token for token, wrong in zip(tokens.tolist(), bad)]


def _adjusted(logits: Tensor, rows: Sized[Row]) -> Tensor:
    """The logits with biases, penalties and what may not be drawn yet; a copy where anything changes."""
    changed = logits
    for index, (sequence, j, _) in enumerate(rows):
        params = sequence.params
        too_early = sequence.num_output + j < params.min_tokens and sequence.request.stop_ids
        too_early = too_early and sequence.matcher is None  # a constraint says itself where a text may end
        if not (params.logit_bias or params.has_penalties or sequence.matcher is not None or too_early):
            continue
        if changed is logits:
            changed = logits.clone()
        row = changed[index : index + 1]
        if params.has_penalties:
            seen = torch.tensor([sequence.tokens + sequence.drafts[:j]], device=logits.device)
            ops.apply_penalties_(
                row, seen, torch.tensor([sequence.request.prompt_len], device=logits.device),
                repetition=params.repetition_penalty, presence=params.presence_penalty,
                frequency=params.frequency_penalty,
            )  # fmt: skip
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            row[0, ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=logits.device)
        if too_early:
            row[0, list(sequence.request.stop_ids)] = -torch.inf
    if constrained := [(i, s.matcher, s.drafts[:j]) for i, (s, j, _) in enumerate(rows) if s.matcher is not None]:
        mask_logits_(changed, constrained)
    return changed


def token_logprobs(logits: Tensor, tokens: Sized[int], count: int) -> list[TokenLogprob]:
    """Of one token per row of logits."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > own).sum(dim=1) + 1
    top = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    return [
        TokenLogprob(token, logprob, rank, dict(zip(ids, values)))
        for token, logprob, rank, ids, values in zip(
            tokens, own[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist()
        )
    ]
