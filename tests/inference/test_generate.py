"""Cached generation against the full forward pass, and the block bookkeeping under it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcore.inference import PagedKVCache, generate
from llmcore.inference.sampling import probabilities
from llmcore.models import PRESETS, ModelConfig, Transformer, llama

TEXT = list(Path(textwrap.__file__).read_bytes())
PROMPTS = [TEXT[:5], TEXT[50:51], TEXT[100:133], TEXT[200:216]]
CONFIGS = {name: preset("tiny") for name, preset in PRESETS.items()} | {
    "mha": llama("tiny", num_kv_heads=4),
    "mqa": llama("tiny", num_kv_heads=1),
    "options": llama("tiny", window=6, attention_sinks=True, attention_softcap=4.0, qk_norm=True, logit_softcap=20.0),
    "post": llama("tiny", norm_placement="post"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


def make(config: ModelConfig, dtype=torch.float32) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype)


@torch.no_grad()
def greedy_by_full_passes(model, prompt, max_tokens):
    """(tokens, smallest lead of the best logit over the second)."""
    tokens, lead = list(prompt), float("inf")
    for _ in range(max_tokens):
        logits = model.logits(model(torch.tensor([tokens])).hidden[0, -1])
        best = logits.topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], lead


def test_greedy_equals_full_passes(model):
    expected = [greedy_by_full_passes(model, prompt, 20) for prompt in PROMPTS]
    assert min(lead for _, lead in expected) > 1e-4  # no two logits so close that a rounding may swap them
    outputs = generate(model, PROMPTS, max_tokens=20, temperature=0)
    assert outputs == [tokens for tokens, _ in expected]
    assert len({tuple(o) for o in outputs}) > 1


@torch.no_grad()
def test_cached_logits_equal_full_pass(model):
    """Prefill of two texts in uneven chunks, then single steps: all the logits, not the best alone."""
    texts = [torch.tensor(TEXT[:45]), torch.tensor(TEXT[300:345])]
    full = [model.logits(model(t[None]).hidden[0]) for t in texts]
    cache = PagedKVCache(model.config, 12, block_size=8)
    for tensor in cache.k_caches + cache.v_caches:
        tensor.fill_(float("nan"))
    begin = [0, 0]
    for counts in [(20, 1), (7, 30), *[(1, 1)] * 14]:
        step = cache.extend([0, 1], counts)
        spans = [slice(b, b + n) for b, n in zip(begin, counts)]
        out = model.logits(model(torch.cat([t[s] for t, s in zip(texts, spans)]), cache=step).hidden)
        torch.testing.assert_close(out, torch.cat([f[s] for f, s in zip(full, spans)]), rtol=1e-4, atol=1e-4)
        begin = [b + n for b, n in zip(begin, counts)]


def test_bfloat16_runs_with_a_cache_of_its_dtype():
    model = make(llama("tiny"), torch.bfloat16)
    outputs = generate(model, PROMPTS, max_tokens=8, temperature=0)
    assert [len(o) for o in outputs] == [8] * 4


def test_seeds():
    model = make(llama("tiny"))
    settings = {"max_tokens": 12, "temperature": 1.5, "top_k": 100}
    first = generate(model, PROMPTS, seed=3, **settings)
    assert generate(model, PROMPTS, seed=3, **settings) == first
    assert generate(model, PROMPTS, seed=4, **settings) != first
    assert generate(model, PROMPTS, seed=[3, 4, 5, 6], **settings) == first
    # a prompt gets the same alone, or in another order, as long as its seed is the same
    assert generate(model, [PROMPTS[2]], seed=5, **settings) == [first[2]]
    assert generate(model, PROMPTS[::-1], seed=[6, 5, 4, 3], **settings) == first[::-1]
    # one prompt twice gives two samples
    twice = generate(model, [PROMPTS[0]] * 2, seed=3, **settings)
    assert twice[0] != twice[1]
    torch.manual_seed(8)
    unseeded = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS, **settings) != unseeded


def test_samples_follow_the_model():
    """First tokens of 1,000 samples of one prompt, by a chi-squared test over the kept tokens (7 degrees, 99.99 %)."""
    model = make(llama("tiny"))
    settings = {"temperature": 2.0, "top_k": 8}
    with torch.no_grad():
        p = probabilities(model.logits(model(torch.tensor([PROMPTS[1]])).hidden[0, -1:]), **settings)[0]
    assert int((p * 1000 > 20).sum()) == 8
    counts = torch.zeros(512, dtype=torch.float64)
    for (token,) in generate(model, [PROMPTS[1]] * 1000, max_tokens=1, seed=0, **settings):
        counts[token] += 1
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * 1000
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 29.9


def test_stop_ids_and_on_token():
    model = make(llama("tiny"))
    free = generate(model, PROMPTS, max_tokens=10, temperature=0)
    stop = free[0][3]
    seen: list[tuple[int, int]] = []
    stopped = generate(
        model, PROMPTS, max_tokens=10, temperature=0, stop_ids={stop}, on_token=lambda *pair: seen.append(pair)
    )
    for before, after in zip(free, stopped):
        end = before.index(stop) + 1 if stop in before else 10
        assert after == before[:end]
    assert len(stopped[0]) < 10
    for index, tokens in enumerate(stopped):
        assert [token for i, token in seen if i == index] == tokens


def test_mode_is_restored_and_dropout_is_off():
    model = make(llama("tiny", dropout=0.5)).train()
    first = generate(model, PROMPTS, max_tokens=5, temperature=0)
    assert model.training
    assert generate(model, PROMPTS, max_tokens=5, temperature=0) == first
    assert generate(model.eval(), [], max_tokens=5) == []
    assert not model.training


def test_refuses():
    model = make(llama("tiny"))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_tokens=5)
    with pytest.raises(ValueError, match="max_tokens is 0; accepted: 1 or more"):
        generate(model, [[1]], max_tokens=0)
    with pytest.raises(ValueError, match=r"prompt 0 has 200 tokens and max_tokens is 57; .* max_positions = 256"):
        generate(model, [[1] * 200], max_tokens=57)
    with pytest.raises(ValueError, match="prompt 1 holds token id 512; accepted: 0 to vocab_size - 1 = 511"):
        generate(model, [[1], [1, 512]], max_tokens=5)
    for bad, shown in (([[1], "text"], "1 is 'text'"), ([7, 8], "0 is 7"), ([[1.5]], r"0 is \[1.5\]")):
        with pytest.raises(TypeError, match=f"prompt {shown}; accepted: a sequence of token ids"):
            generate(model, bad, max_tokens=5)
    with pytest.raises(ValueError, match=r"max_tokens is 1\.5; accepted: 1 or more"):
        generate(model, [[1]], max_tokens=1.5)
    with pytest.raises(ValueError, match=r"seed is 18446744073709551616; accepted: -2\*\*63 to 2\*\*64 - 1"):
        generate(model, [[1], [2]], max_tokens=5, seed=2**64 - 1)
    model = make(llama("tiny", tied_embeddings=False))
    model.embed_tokens.weight.data[3] = float("nan")
    with pytest.raises(RuntimeError, match="logits of row 1 hold NaN or \\+inf"):
        generate(model, [[1], [3]], max_tokens=5)
    with pytest.raises(ValueError, match="seed has 1 entries; accepted: one per prompt, 2"):
        generate(model, [[1], [2]], max_tokens=5, seed=[1])
    with pytest.raises(ValueError, match="top_k is 0"):
        generate(model, [[1]], max_tokens=5, top_k=0)


def test_prompts_as_tensors():
    model = make(llama("tiny"))
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = generate(model, prompts, max_tokens=5, temperature=0)
    assert generate(model, torch.tensor(prompts), max_tokens=5, temperature=0) == expected
    assert generate(model, np.array(prompts), max_tokens=5, temperature=0) == expected
    first = generate(model, prompts, max_tokens=5, seed=3)
    assert generate(model, prompts, max_tokens=5, seed=np.int64(3)) == first


def test_blocks_are_handed_out_and_back():
    cache = PagedKVCache(llama("tiny"), 6, block_size=4)
    step = cache.extend([10, 20], [5, 4])
    assert step.kv_lens.tolist() == [5, 4]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert step.cu_seqlens_q.tolist() == [0, 5, 9]
    assert len(set(step.slot_mapping.tolist())) == 9
    blocks = step.block_table.tolist()
    assert [s // 4 for s in step.slot_mapping.tolist()] == [blocks[0][0]] * 4 + [blocks[0][1]] + [blocks[1][0]] * 4
    assert cache.num_free_blocks == 3

    step = cache.extend([20, 10], [1, 1])
    assert step.cu_seqlens_q is None
    assert step.positions.tolist() == [4, 5]
    assert cache.num_free_blocks == 2  # sequence 20 began a block, 10 had room

    with pytest.raises(MemoryError, match="3 more cache blocks of 4 tokens are needed; 2 of 6 are free"):
        cache.extend([10, 30], [3, 5])
    assert [cache.length(s) for s in (10, 20, 30)] == [6, 5, 0]  # nothing has changed
    assert cache.num_free_blocks == 2
    cache.release(10)
    assert cache.num_free_blocks == 4
    step = cache.extend([30], [16])
    assert not set(step.block_table[0].tolist()) & set(cache.extend([20], [1]).block_table[0].tolist())
    assert cache.num_free_blocks == 0
    assert cache.extend([], []).block_table.shape == (0, 0)
    with pytest.raises(KeyError, match="sequence 10 is not in the cache"):
        cache.release(10)
    with pytest.raises(ValueError, match="counts are"):
        cache.extend([30], [0])
    with pytest.raises(ValueError, match="sequences are"):
        cache.extend([30, 30], [1, 1])
