"""Models, requests and the plainest possible oracle for tests of the engine."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from llmcore.inference import Engine, SamplingParams
from llmcore.models import Transformer, llama, llama_moe
from llmcore.models.config import MLAConfig
from tests.inference.test_generate import TEXT, greedy_by_full_passes, make

MLA = MLAConfig(
    q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
CONFIGS = {
    "llama": llama("tiny", max_positions=96),
    "window": llama("tiny", max_positions=96, window=6, attention_sinks=True, qk_norm=True),
    "mla": llama("tiny", max_positions=96, num_kv_heads=4, mla=MLA),
    "moe": llama_moe("tiny", max_positions=96),
}


class Asked(NamedTuple):
    prompt: list[int]
    max_tokens: int
    arrival: int  # the step before which it comes


def requests(count: int, seed: int = 0) -> list[Asked]:
    """Mixed lengths, some with a beginning in common, arriving at random."""
    rng = random.Random(seed)
    asked, step = [], 0
    for _ in range(count):
        begin = rng.randrange(2000)
        prompt = TEXT[begin : begin + rng.choice((1, 2, 5, 9, 20, 33, 50, 64))]
        if rng.random() < 0.4:
            prompt = TEXT[: rng.choice((8, 16, 35))] + prompt[:28]
        asked.append(Asked(prompt, rng.randint(1, 14), step))
        step += rng.choice((0, 0, 0, 1, 2, 5))
    return asked


def serve(engine: Engine, asked: list[Asked], each=None, **params) -> list[list[int]]:
    """The tokens of each request, all of them served as they arrive. `each` is called after each step."""
    left = sorted(range(len(asked)), key=lambda i: asked[i].arrival)
    tokens: list[list[int]] = [[] for _ in asked]
    ids: dict[str, int] = {}
    step = 0
    bound = sum(len(a.prompt) + a.max_tokens for a in asked) * params.get("n", 1) + asked[left[-1]].arrival
    while left or engine.has_work:
        while left and asked[left[0]].arrival <= step:
            index = left.pop(0)
            wanted = SamplingParams(**{"max_tokens": asked[index].max_tokens, "temperature": 0} | params)
            ids[engine.add(asked[index].prompt, wanted)] = index
        for delta in engine.step():
            tokens[ids[delta.request_id]] += delta.tokens
        if each is not None:
            each(engine)
        step += 1
        assert step <= bound, "no progress"
    return tokens


def all_free(engine: Engine) -> bool:
    return (
        engine.cache.num_free_blocks == engine.cache.num_blocks
        and not engine.cache.sequences
        and not engine.scheduler.waiting
        and not engine.scheduler.running
        and not engine.has_work
    )


def by_full_passes(model: Transformer, asked: list[Asked]) -> list[list[int]]:
    """Greedy tokens without cache or batch; no two logits may be so close that a rounding could swap them."""
    expected = []
    for a in asked:
        tokens, lead = greedy_by_full_passes(model, a.prompt, a.max_tokens)
        assert lead > 2e-5, "choose other requests"
        expected.append(tokens)
    return expected


@torch.no_grad()
def logprobs_by_full_pass(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """(tokens - 1, vocab): the log-probabilities of what follows each token but the last."""
    return model.logits(model(torch.tensor([tokens])).hidden)[0, :-1].float().log_softmax(-1)


__all__ = [
    "CONFIGS", "TEXT", "Asked", "all_free", "by_full_passes", "logprobs_by_full_pass", "make", "requests", "serve",
]  # fmt: skip
