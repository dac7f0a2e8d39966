"""Generation for a batch of prompts: one packed prefill, then one token per sequence and step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.decode_graph import DecodeGraph, can_capture
from llmcore.inference.sampling import check_sampling, draw
from llmcore.models import ModelConfig, Transformer


@torch.inference_mode()  # unlike no_grad, ops then skip their autograd layer: 3 us a call
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
        model: runs in evaluation mode, in its own dtype and on its own device.
        prompts: token ids, at least one per prompt; a (batch, seq) tensor will do.
        max_tokens: the most new tokens per prompt.
        temperature, top_k, top_p, min_p: see `llmcore.ops.sample`; temperature 0 is greedy.
        seed: one seed per prompt, or one number s that stands for s, s + 1, ...; None draws it. A token's noise is a
            function of its prompt's seed and its place in the sequence, on every device, so what a prompt gets does
            not depend on the prompts beside it.
        stop_ids: a sequence ends with the first of these that it draws.
        on_token: called as on_token(prompt_index, token) for each new token.

    Returns:
        The new tokens of each prompt, the stop token that ended it included.

    Raises:
        ValueError: for an empty prompt, a token id outside the vocabulary, a setting out of its range, or a prompt
            that with max_tokens is longer than the model's max_positions.
        TypeError: for a prompt that is no sequence of integers.
        RuntimeError: when a row of the model's logits holds NaN or +inf.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    if not isinstance(max_tokens, Integral) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; accepted: 1 or more")
    inputs = _token_ids(prompts, max_tokens, model.config)
    if not inputs:
        return []
    seeds = _seeds(seed, len(inputs))
    lengths = [len(prompt) for prompt in inputs]
    weight = model.lm_head_weight
    num_blocks = [PagedKVCache.blocks_for(len(prompt) + max_tokens) for prompt in inputs]
    cache = PagedKVCache(model.config, sum(num_blocks), dtype=weight.dtype, device=weight.device)
    graphs = _DecodeGraphs(model, cache, max(num_blocks)) if can_capture(model) else None
    outputs: list[list[int]] = [[] for _ in inputs]
    running = list(range(len(inputs)))
    was_training = model.training
    model.eval()
    try:
        while running:
            if graphs is None or not outputs[running[0]]:  # the prompts
                logits = _last_logits(model, cache, running, inputs)
            else:
                logits = graphs.logits(running, [tokens[-1] for tokens in inputs])
            positions = [lengths[index] + len(outputs[index]) for index in running]
            tokens = draw(
                logits, [seeds[index] for index in running], positions,
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            )  # fmt: skip
            for index, token in zip(running, tokens):
                outputs[index].append(token)
                if on_token is not None:
                    on_token(index, token)
                if token in stop_ids or len(outputs[index]) == max_tokens:
                    cache.release(index)
            running = [index for index in running if index in cache.blocks]
            inputs = [outputs[index][-1:] for index in running]
    finally:
        model.train(was_training)
    return outputs


def _token_ids(prompts: Sequence[Sequence[int]], max_tokens: int, config: ModelConfig) -> list[list[int]]:
    """The prompts as lists of integers, checked."""
    ids = []
    for index, prompt in enumerate(prompts):
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError:
            raise TypeError(f"prompt {index} is {prompt!r}; accepted: a sequence of token ids") from None
        if not tokens:
            raise ValueError(f"prompt {index} is empty; accepted: at least one token")
        if wrong := [token for token in tokens if not 0 <= token < config.vocab_size]:
            raise ValueError(
                f"prompt {index} holds token id {wrong[0]}; accepted: 0 to vocab_size - 1 = {config.vocab_size - 1}"
            )
        if config.position_limit is not None and len(tokens) + max_tokens > config.max_positions:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens and max_tokens is {max_tokens}; accepted: together at most "
                f"max_positions = {config.max_positions}"
            )
        ids.append(tokens)
    return ids


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = [int(s) for s in seed] if isinstance(seed, Iterable) else list(range(seed, seed + count))
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} entries; accepted: one per prompt, {count}")
    for s in seeds:
        if not -(2**63) <= s < 2**64:
            raise ValueError(f"seed is {s}; accepted: -2**63 to 2**64 - 1")
    return seeds


class _DecodeGraphs:
    """A `DecodeGraph` for each power of two of running sequences, made when it is first needed."""

    def __init__(self, model: Transformer, cache: PagedKVCache, max_blocks: int) -> None:
        self._graphs: dict[int, DecodeGraph] = {}
        self._make = functools.partial(DecodeGraph, model, cache, max_blocks=max_blocks)
        self._pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def logits(self, sequences: list[int], tokens: list[int]) -> Tensor:
        batch_size = 1 << (len(sequences) - 1).bit_length()
        if batch_size not in self._graphs:
            self._graphs[batch_size] = self._make(batch_size=batch_size, pool=self._pool)
        return self._graphs[batch_size].logits(sequences, tokens)


def _last_logits(model: Transformer, cache: PagedKVCache, sequences: list[int], inputs: list[list[int]]) -> Tensor:
    """Runs each sequence's new tokens. Gives the logits after its last one, (sequences, vocab)."""
    step = cache.extend(sequences, [len(tokens) for tokens in inputs])
    packed = torch.tensor([token for tokens in inputs for token in tokens], device=cache.device)
    hidden = model(packed, cache=step).hidden
    return model.logits(hidden if step.cu_seqlens_q is None else hidden[step.cu_seqlens_q[1:].long() - 1])
