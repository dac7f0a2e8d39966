"""Generation for a batch of prompts: one packed prefill, then one token per sequence and step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.sampling import check_sampling, draw, probabilities
from llmcore.models import Transformer


@torch.no_grad()
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
        prompts: token ids, at least one per prompt.
        max_tokens: the most new tokens per prompt.
        temperature, top_k, top_p, min_p: see `llmcore.inference.sampling.probabilities`; temperature 0 is greedy.
        seed: one seed per prompt, or one number s that stands for s, s + 1, ...; None draws it. Each prompt has a
            random stream of its own, so what it gets does not depend on the prompts beside it.
        stop_ids: a sequence ends with the first of these that it draws.
        on_token: called as on_token(prompt_index, token) for each new token.

    Returns:
        The new tokens of each prompt, the stop token that ended it included.

    Raises:
        ValueError: for an empty prompt, a token id outside the vocabulary, a setting out of its range, or a prompt
            that with max_tokens is longer than the model's max_positions.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; accepted: 1 or more")
    config = model.config
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; accepted: at least one token")
        if config.position != "none" and len(prompt) + max_tokens > config.max_positions:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_tokens is {max_tokens}; accepted: together at most "
                f"max_positions = {config.max_positions}"
            )
    if not prompts:
        return []
    generators = _generators(seed, len(prompts))
    weight = model.lm_head_weight
    num_blocks = sum(PagedKVCache.blocks_for(len(prompt) + max_tokens) for prompt in prompts)
    cache = PagedKVCache(config, num_blocks, dtype=weight.dtype, device=weight.device)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    inputs = [list(prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        while running:
            logits = _last_logits(model, cache, running, inputs)
            probs = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            uniform = torch.cat([torch.rand(1, generator=generators[i], dtype=torch.float64) for i in running])
            for index, token in zip(running, draw(probs, uniform.to(probs.device)).tolist()):
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


def _generators(seed: int | Sequence[int] | None, count: int) -> list[torch.Generator]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = range(seed, seed + count) if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} entries; accepted: one per prompt, {count}")
    for s in seeds:
        if not -(2**63) <= s < 2**64:
            raise ValueError(f"seed is {s}; accepted: -2**63 to 2**64 - 1")
    return [torch.Generator().manual_seed(s) for s in seeds]


def _last_logits(model: Transformer, cache: PagedKVCache, sequences: list[int], inputs: list[list[int]]) -> Tensor:
    """Runs each sequence's new tokens. Gives the logits after its last one, (sequences, vocab)."""
    step = cache.extend(sequences, [len(tokens) for tokens in inputs])
    packed = torch.tensor([token for tokens in inputs for token in tokens], device=cache.device)
    hidden = model(packed, cache=step).hidden
    return model.logits(hidden if step.cu_seqlens_q is None else hidden[step.cu_seqlens_q[1:].long() - 1])
