"""From the logits of a step to tokens, each row by its own request's settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Sized
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore import ops
from llmcore.inference.constraints import Matcher, mask_logits_
from llmcore.inference.sequence import Sequence, TokenLogprob


class Row(NamedTuple):
    """A row of logits to draw from: it comes after the first `drafts` drafts of `sequence`, as row `at` of a step's."""

    sequence: Sequence
    drafts: int
    at: int


def draw_rows(logits: Tensor, rows: Sized[Row]) -> tuple[list[int | None], list[TokenLogprob | None]]:
    """A token for each row of logits, None for one that holds NaN or +inf or nothing that may be drawn; and its
    log-probability where it is asked for."""
    adjusted = _adjusted(logits, rows)
    tokens, logprobs = _sample(adjusted, rows)
    told: list[TokenLogprob | None] = [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.sequence.params.logprobs is not None and tokens[i] is not None]
    if asking:
        some = len(asking) < len(rows)
        index = torch.tensor(asking, device=logits.device) if some else None
        known = logprobs[index] if some else logprobs
        if adjusted is not logits:  # what is known of a row must not depend on the rows beside it
            adjusts = torch.tensor([rows[i].sequence.request.adjusts for i in asking], device=logits.device)
            known = known.masked_fill(adjusts, torch.nan)
        counts = [rows[i].sequence.params.logprobs for i in asking]
        of = token_logprobs(logits[index] if some else logits, [tokens[i] for i in asking], counts, known)
        for i, logprob in zip(asking, of):
            told[i] = logprob
    return tokens, told


def draw_tokens(logits: Tensor, rows: Sized[Row]) -> list[int | None]:
    """The tokens of `draw_rows` alone."""
    return _sample(_adjusted(logits, rows), rows)[0]


def _sample(logits: Tensor, rows: Sized[Row]) -> tuple[list[int | None], Tensor]:
    settings = [row.sequence.request.sampling for row in rows]
    first, device = settings[0], logits.device
    if all(s == first for s in settings):
        temperature, top_k, top_p, min_p, seeds, positions = _same(first, len(rows), device)
        greedy = first[0] == 0
    else:
        temperature, top_k, top_p, min_p = (torch.tensor(values, device=device) for values in zip(*settings))
        greedy = False
    if not greedy:
        seeds = torch.tensor([row.sequence.seed for row in rows], device=device)
        positions = torch.tensor([len(row.sequence.tokens) + row.drafts for row in rows], device=device)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    try:
        tokens, logprobs = ops.sample(logits, **given, seeds=seeds, positions=positions)
    except RuntimeError:  # on the CPU the op raises for all where one row is bad
        top = logits.amax(dim=-1, keepdim=True)
        bad = ~torch.isfinite(top)
        if not bad.any():
            raise
        tokens, logprobs = ops.sample(logits.masked_fill(bad, 0), **given, seeds=seeds, positions=positions)
        tokens = tokens.masked_fill(bad[:, 0], -1)
    return [token if token >= 0 else None for token in tokens.tolist()], logprobs


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _same(settings: tuple, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """One request's settings for every row, and seeds and positions that are 0: six tensors that most steps share."""
    return tuple(torch.full((rows,), value, device=device) for value in (*settings, 0, 0))


def _adjusted(logits: Tensor, rows: Sized[Row]) -> Tensor:
    """The logits with biases, penalties and what may not be drawn yet; a copy where anything changes."""
    changed = logits
    constrained: list[tuple[int, Matcher, list[int]]] = []
    for index, (sequence, drafts, _) in enumerate(rows):
        if not sequence.request.adjusts:
            continue
        params = sequence.params
        if changed is logits:
            changed = logits.clone()
        row = changed[index]
        if params.has_penalties:
            seen = torch.tensor([sequence.tokens + sequence.drafts[:drafts]], device=logits.device)
            ops.apply_penalties_(
                row[None], seen, torch.tensor([sequence.request.prompt_len], device=logits.device),
                repetition=params.repetition_penalty, presence=params.presence_penalty,
                frequency=params.frequency_penalty,
            )  # fmt: skip
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=logits.device)
        if sequence.matcher is not None:  # which says itself where a text may end
            constrained.append((index, sequence.matcher, sequence.drafts[:drafts]))
        elif sequence.num_output + drafts < params.min_tokens and sequence.request.stop_ids:
            row[list(sequence.request.stop_ids)] = -torch.inf
    if constrained:
        mask_logits_(changed, constrained)
    return changed


def token_logprobs(
    logits: Tensor, tokens: Sized[int], counts: int | Sized[int], known: Tensor | None = None
) -> list[TokenLogprob]:
    """Of one token per row of logits, and of the `counts` likeliest ones; ranks only where some are asked for.

    Args:
        known: (rows,) float32, the tokens' log-probabilities, or NaN where they are not known already.
    """
    counts = [counts] * len(tokens) if isinstance(counts, int) else counts
    most = min(max(counts), logits.shape[1])
    unknown = known.isnan() if known is not None else None
    some_unknown = known is None or bool(unknown.any())
    if most == 0 and not some_unknown:
        return [TokenLogprob(token, logprob, 0, {}) for token, logprob in zip(tokens, known.tolist())]
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = [0] * len(tokens)
    if most:
        ranks = [rank if n else 0 for rank, n in zip(((logits > own).sum(dim=1) + 1).tolist(), counts)]
    own = own[:, 0].float()
    total = logits.float().logsumexp(dim=-1) if some_unknown else own - known
    if some_unknown and known is not None:
        total = torch.where(unknown, total, own - known)
    logprobs = (own - total).tolist()
    tops: list[dict[int, float]] = [{} for _ in tokens]
    if most:
        top = logits.topk(most, dim=-1)
        values = (top.values.float() - total[:, None]).tolist()
        tops = [dict(zip(i[:n], v[:n])) for i, v, n in zip(top.indices.tolist(), values, counts)]
    return [TokenLogprob(*of) for of in zip(tokens, logprobs, ranks, tops)]
