"""Tokens in, tokens out: a batch of prompts through an engine of its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Delta, Finish
from llmcore.models import ModelConfig, Transformer

BLOCK_SIZE = 16


class NewToken(NamedTuple):
    """A drawn token: prompt, the index of its prompt; logprob, under the softmax of the model's logits, before
    penalties, temperature and filters; last, whether its sequence ends with it."""

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
    seed: int | Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    **sampling: Any,
) -> Iterator[NewToken]:
    """Continues every prompt, and gives each token when it is drawn, those of one step in the order of their prompts.

    Args:
        model: runs in evaluation mode, in its own dtype and on its own device.
        prompts: token ids, at least one per prompt; a (batch, seq) tensor will do.
        max_tokens: the most new tokens per prompt.
        seed: one seed per prompt, or one number s that stands for s, s + 1, ...; None draws it. A token's noise is a
            function of its prompt's seed and its place in the sequence, on every device, so what a prompt gets does
            not depend on the prompts beside it.
        stop_ids: a sequence ends with the first of these that it draws.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see
            `SamplingParams`.

    Raises:
        ValueError: at once, for an empty prompt, a token id outside the vocabulary, a setting out of its range, or a
            prompt that with max_tokens is longer than the model's max_positions.
        TypeError: for a prompt that is no sequence of integers.
        RuntimeError: when a row of the model's logits holds NaN or +inf.
    """
    if not isinstance(max_tokens, Integral):
        raise ValueError(f"max_tokens is {max_tokens}; accepted: 1 or more")
    inputs = token_ids(prompts, max_tokens, model.config)
    params = [
        SamplingParams(max_tokens=max_tokens, seed=s, logprobs=0, **sampling)
        for s in seeds_of(seed, max(1, len(inputs)))
    ]
    return _stream(model, inputs, params, frozenset(stop_ids)) if inputs else iter(())


def _stream(
    model: Transformer, prompts: list[list[int]], params: list[SamplingParams], stop_ids: frozenset[int]
) -> Iterator[NewToken]:
    was_training = model.training
    engine = Engine(model, stop_ids=stop_ids, **room_for(prompts, params[0].max_tokens), prefix_caching=False)
    try:
        for index, delta in engine.stream(prompts, params):
            check_delta(index, delta)
            for place, (token, told) in enumerate(zip(delta.tokens, delta.logprobs or ()), 1):
                last = delta.finish is not None and place == len(delta.tokens)
                yield NewToken(index, token, told.logprob, last)
    finally:
        model.train(was_training)


def room_for(prompts: Sequence[Sequence[int]], max_tokens: int, most: int | None = None) -> dict[str, int]:
    """Options of an engine that runs all prompts together, or `most` of them."""
    num_blocks = sorted(PagedKVCache.blocks_for(len(prompt) + max_tokens, BLOCK_SIZE) for prompt in prompts)[::-1]
    together = min(len(prompts), most or len(prompts))
    return {
        "block_size": BLOCK_SIZE,
        "cache_tokens": (sum(num_blocks[:together]) + together) * BLOCK_SIZE,  # and one to spare for each
        "max_sequences": together,
        "max_batch_tokens": max(2048, 2 * together),
    }


def check_delta(index: int, delta: Delta) -> None:
    if delta.finish is Finish.ERROR:
        raise RuntimeError(
            f"the logits of row {index} hold NaN or +inf, or are all -inf; accepted: finite logits, and -inf beside a "
            "finite one"
        )


def token_ids(prompts: Sequence[Sequence[int]], max_tokens: int, config: ModelConfig) -> list[list[int]]:
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


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each of `count` prompts."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = [int(s) for s in seed] if isinstance(seed, Iterable) else list(range(seed, seed + count))
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} entries; accepted: one per prompt, {count}")
    for s in seeds:
        if not -(2**63) <= s < 2**64:
            raise ValueError(f"seed is {s}; accepted: -2**63 to 2**64 - 1")
    return seeds
