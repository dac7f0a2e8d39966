"""Generation for a batch of prompts: one packed prefill, then one token per sequence and step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.decode_graph import DecodeGraph, can_capture
from llmcore.inference.decoder import Decoder, can_decode
from llmcore.inference.sampling import Penalties, check_sampling, draw
from llmcore.models import ModelConfig, Transformer


class NewToken(NamedTuple):
    """A drawn token: prompt, the index of its prompt; logprob, under the softmax of the logits, penalties included but
    neither temperature nor filters; last, whether its sequence ends with it."""

    prompt: int
    token: int
    logprob: float
    last: bool


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    on_token: Callable[[int, int], None] | None = None,
    **settings,
) -> list[list[int]]:
    """Continues every prompt: `stream` to its end.

    Args:
        model, prompts, settings: see `stream`.
        on_token: called as on_token(prompt_index, token) for each new token.

    Returns:
        The new tokens of each prompt, the stop token that ended it included.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, **settings):
        outputs[new.prompt].append(new.token)
        if on_token is not None:
            on_token(new.prompt, new.token)
    return outputs


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    stop_when: Callable[[int, int], bool] | None = None,
) -> Iterator[NewToken]:
    """Continues every prompt, and gives each token when it is drawn, those of one step in the order of their prompts.

    Args:
        model: runs in evaluation mode, in its own dtype and on its own device.
        prompts: token ids, at least one per prompt; a (batch, seq) tensor will do.
        max_tokens: the most new tokens per prompt.
        temperature, top_k, top_p, min_p: see `llmcore.ops.sample`; temperature 0 is greedy.
        repetition_penalty, presence_penalty, frequency_penalty: see `llmcore.ops.apply_penalties_`.
        seed: one seed per prompt, or one number s that stands for s, s + 1, ...; None draws it. A token's noise is a
            function of its prompt's seed and its place in the sequence, on every device, so what a prompt gets does
            not depend on the prompts beside it.
        stop_ids: a sequence ends with the first of these that it draws.
        stop_when: asked as stop_when(prompt_index, token) after each token whether its sequence ends with it.

    Raises:
        ValueError: at once, for an empty prompt, a token id outside the vocabulary, a setting out of its range, or a
            prompt that with max_tokens is longer than the model's max_positions.
        TypeError: for a prompt that is no sequence of integers.
        RuntimeError: when a row of the model's logits holds NaN or +inf.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    penalties = Penalties(repetition_penalty, presence_penalty, frequency_penalty)
    if not isinstance(max_tokens, Integral) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; accepted: 1 or more")
    inputs = _token_ids(prompts, max_tokens, model.config)
    if not inputs:
        return iter(())
    seeds = _seeds(seed, len(inputs))
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return _steps(model, inputs, max_tokens, sampling, penalties, seeds, frozenset(stop_ids), stop_when)


@torch.inference_mode()  # unlike no_grad, ops then skip their autograd layer: 3 us a call
def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: dict,
    penalties: Penalties,
    seeds: list[int],
    stop_ids: frozenset[int],
    stop_when: Callable[[int, int], bool] | None,
) -> Iterator[NewToken]:
    num_blocks = [PagedKVCache.blocks_for(len(prompt) + max_tokens) for prompt in prompts]
    cache = PagedKVCache(model.config, sum(num_blocks), dtype=model.dtype, device=model.device)
    decoder = Decoder(model, cache) if can_decode(model) else None
    graphs = _DecodeGraphs(model, cache, max(num_blocks)) if can_capture(model) else None
    outputs: list[list[int]] = [[] for _ in prompts]
    running, inputs = list(range(len(prompts))), prompts
    was_training = model.training
    model.eval()
    try:
        while running:
            if graphs is None or not outputs[running[0]]:  # the prompts
                logits = _last_logits(model, decoder, cache, running, inputs)
            else:
                logits = graphs.logits(running, [tokens[-1] for tokens in inputs])
            if penalties.on:
                logits = penalties.apply(logits, [prompts[i] for i in running], [outputs[i] for i in running])
            positions = [len(prompts[i]) + len(outputs[i]) for i in running]
            tokens, logprobs = draw(logits, [seeds[i] for i in running], positions, **sampling)
            for index, token, logprob in zip(list(running), tokens, logprobs):
                outputs[index].append(token)
                last = token in stop_ids or len(outputs[index]) == max_tokens
                last = bool(stop_when is not None and stop_when(index, token)) or last
                if last:
                    cache.release(index)
                    running.remove(index)
                yield NewToken(index, token, logprob, last)
            inputs = [outputs[index][-1:] for index in running]
    finally:
        model.train(was_training)


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


def _last_logits(
    model: Transformer, decoder: Decoder | None, cache: PagedKVCache, sequences: list[int], inputs: list[list[int]]
) -> Tensor:
    """Runs each sequence's new tokens. Gives the logits after its last one, (sequences, vocab)."""
    step = cache.extend(sequences, [len(tokens) for tokens in inputs])
    packed = torch.tensor([token for tokens in inputs for token in tokens], device=cache.device)
    if decoder is not None and len(packed) <= decoder.MAX_TOKENS:
        hidden = decoder.hidden(packed, step)
    else:
        hidden = model(packed, cache=step).hidden
    return model.logits(hidden if step.cu_seqlens_q is None else hidden[step.cu_seqlens_q[1:].long() - 1])
