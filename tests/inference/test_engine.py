"""The engine: what a request gets does not depend on the requests beside it, nor on where the cache runs out."""

from __future__ import annotations

import functools

import pytest
import torch

from llmcore.inference import Engine, Finish, SamplingParams, runner
from llmcore.layers import quantize_model
from llmcore.models import llama
from tests.inference.engines import CONFIGS, TEXT, all_free, by_full_passes, make, requests, serve

ASKED = requests(100)
TINY = {"cache_tokens": 96, "block_size": 2, "max_batch_tokens": 40, "max_sequences": 12}
OPTIONS = {
    "plain": {"prefix_caching": False},
    "prefixes": {"block_size": 4},
    "chunks": {"max_batch_tokens": 13, "max_sequences": 12, "prefix_caching": False},
    "recompute": TINY | {"prefix_caching": False},
    "recompute, prefixes": TINY,
    "swap": TINY | {"preemption": "swap", "prefix_caching": False},
    "swap, prefixes": TINY | {"preemption": "swap"},
}


@functools.cache
def expected(name):
    model = make(CONFIGS[name]).eval()
    return model, by_full_passes(model, ASKED)


CASES = [("llama", options) for options in OPTIONS]
CASES += [(n, o) for n in CONFIGS if n != "llama" for o in ("prefixes", "chunks", "recompute", "swap, prefixes")]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_greedy_requests_arriving_at_random_equal_full_passes(name, options):
    model, tokens = expected(name)
    engine = Engine(model, **OPTIONS[options])
    assert serve(engine, ASKED) == tokens
    assert all_free(engine)
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("recompute" in options or "swap" in options)
    assert (stats.prefix_tokens_hit > 0) == ("prefixes" in options)
    assert stats.tokens_generated == sum(a.max_tokens for a in ASKED)
    assert stats.blocks_used == stats.waiting == stats.running == 0


@pytest.mark.parametrize("options", ["plain", "prefixes", "recompute", "swap"])
def test_choices_of_greedy_requests(options):
    """Three choices share a prompt's blocks, and where the cache cannot hold all of them run one after another."""
    model, tokens = expected("llama")
    asked = ASKED[:20]
    engine = Engine(model, **OPTIONS[options])
    ids = [engine.add(a.prompt, SamplingParams(max_tokens=a.max_tokens, temperature=0, n=3)) for a in asked]
    got = {(i, index): [] for i in ids for index in range(3)}
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id, delta.index] += delta.tokens
        steps += 1
        assert steps <= 3 * sum(len(a.prompt) + a.max_tokens for a in asked)
    assert list(got.values()) == [t for t in tokens[:20] for _ in range(3)]
    assert all_free(engine)


def test_requests_that_come_at_once_run_a_common_beginning_once():
    model = expected("llama")[0]
    engine = Engine(model, block_size=4)
    prompts = [TEXT[:64] + TEXT[100 + i : 104 + i] for i in range(12)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    assert engine.stats().tokens_prefilled == 12 * 68 - 11 * 64
    assert [o.cached_tokens for o in outputs] == [0] + [64] * 11
    apart = Engine(model, prefix_caching=False).generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    assert [o.choices[0].tokens for o in outputs] == [o.choices[0].tokens for o in apart]


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_as_graphs(name, monkeypatch):
    """What a GPU captures, run without a graph on the CPU: in sizes of powers of two, beside other steps."""
    monkeypatch.setattr(runner, "can_capture", lambda model: True)
    model, tokens = expected(name)
    for cache_dtype in (None, torch.int8)[: 1 if name == "mla" else 2]:
        engine = Engine(model, cache_dtype=cache_dtype, **TINY)
        got = serve(engine, ASKED[:40])
        assert all_free(engine)
        assert len({size for size, _ in engine.runner._graphs._graphs}) >= 3
        if cache_dtype is None:
            assert got == tokens[:40]
        else:  # int8 steps may differ where a rounding does
            assert sum(a == b for a, b in zip(got, tokens)) > 20


SAMPLED = {"temperature": 1.5, "top_k": 100, "seed": 7}


@pytest.mark.parametrize("options", ["plain", "prefixes", "chunks", "recompute", "swap"])
def test_seeds_give_the_same_in_any_batch(options):
    model = expected("llama")[0]
    asked = ASKED[:30]
    alone = [Engine(model).generate([a.prompt], SamplingParams(max_tokens=a.max_tokens, **SAMPLED))[0] for a in asked]
    assert serve(Engine(model, **OPTIONS[options]), asked, **SAMPLED) == [o.choices[0].tokens for o in alone]


def test_n_choices_are_requests_with_following_seeds():
    model = expected("llama")[0]
    prompts = [TEXT[:40], TEXT[7:19]]
    (many, other) = Engine(model, **TINY).generate(prompts, SamplingParams(max_tokens=12, n=5, **SAMPLED))
    for prompt, output in zip(prompts, (many, other)):
        assert [c.index for c in output.choices] == list(range(5))
        for choice in output.choices:
            params = SamplingParams(max_tokens=12, **SAMPLED | {"seed": 7 + choice.index})
            assert Engine(model).generate([prompt], params)[0].choices[0].tokens == choice.tokens
    assert len({tuple(c.tokens) for c in many.choices}) > 1
    top = SamplingParams(max_tokens=2, seed=2**64 - 1, n=2)
    first = Engine(model).generate(prompts, top)
    assert Engine(model).generate(prompts, top) == first  # seeds wrap around


# ---- bit for bit

INVARIANT = {"plain": {}, "tiny": TINY, "swap": TINY | {"preemption": "swap"}, "chunks": OPTIONS["chunks"]}


def bits(engine, asked, **params):
    """Tokens with their log-probabilities, which any other bit in the logits would change."""
    prompts = [a.prompt for a in asked]
    params = [SamplingParams(max_tokens=a.max_tokens, temperature=0, logprobs=2, **params) for a in asked]
    return [o.choices[0] for o in engine.generate(prompts, params)]


@pytest.mark.parametrize("options", INVARIANT)
@pytest.mark.parametrize(
    ("name", "dtype", "cache_dtype"),
    [
        ("llama", torch.float32, None),
        ("llama", torch.bfloat16, None),
        ("llama", torch.float32, torch.int8),
        ("llama", torch.bfloat16, torch.int8),
        ("window", torch.bfloat16, None),
        ("mla", torch.bfloat16, None),
        ("moe", torch.float32, None),
        ("quantised", torch.bfloat16, None),
    ],
)
def test_batch_invariance_bit_for_bit(name, dtype, cache_dtype, options):
    model = make(CONFIGS["llama" if name == "quantised" else name], dtype).eval()
    if name == "quantised":
        quantize_model(model, "q8_0").requires_grad_(False)
    asked = ASKED[:8] if name in ("mla", "moe") else ASKED[:24]
    common = {"batch_invariant": True, "cache_dtype": cache_dtype}
    alone = [bits(Engine(model, **common), [a])[0] for a in asked]
    assert bits(Engine(model, **common | INVARIANT[options]), asked) == alone


def test_without_it_bits_do_depend_on_the_batch():
    """Else the test above would show nothing. (In bfloat16 some processors' products round alike.)"""
    model = make(CONFIGS["llama"]).eval()
    alone = [bits(Engine(model), [a])[0] for a in ASKED]
    assert bits(Engine(model, prefix_caching=False), ASKED) != alone


# ---- a request's life


def tiny_engine(**options):
    return Engine(expected("llama")[0], **options)


def test_aborts_free_all_at_any_time():
    """Waiting, in the middle of a prompt, with choices, preempted, and while others go on."""
    for when in range(12):
        engine = tiny_engine(**TINY)
        ids = [engine.add(a.prompt, SamplingParams(max_tokens=14, temperature=0, n=1 + i % 3))
               for i, a in enumerate(ASKED[:9])]  # fmt: skip
        for _ in range(when):
            engine.step()
        for i, request_id in enumerate(ids[1:], 1):
            if request_id in engine.requests:
                deltas = engine.abort(request_id)
                assert all(d.finish is Finish.ABORT for d in deltas)
                ended = {d.index for d in deltas}
                assert ended <= set(range(1 + i % 3))
                assert when or len(deltas) == 1 + i % 3
            assert engine.abort(request_id) == []
        while engine.has_work:
            engine.step()
        assert all_free(engine)


def test_steps_tell_of_every_choice_once():
    engine = tiny_engine(**TINY)
    ended = []
    asked = {engine.add(a.prompt, SamplingParams(max_tokens=a.max_tokens, n=2, seed=1)) for a in ASKED[:10]}
    while engine.has_work:
        ended += [(d.request_id, d.index) for d in engine.step() if d.finish is not None]
    assert sorted(ended) == sorted((i, index) for i in asked for index in range(2))


def test_streams_beside_other_requests():
    model, tokens = expected("llama")
    engine = Engine(model)
    other = engine.add(ASKED[0].prompt, SamplingParams(max_tokens=ASKED[0].max_tokens, temperature=0))
    greedy = [SamplingParams(max_tokens=a.max_tokens, temperature=0) for a in ASKED[1:3]]
    stream = engine.stream([a.prompt for a in ASKED[1:3]], greedy)
    got = {0: [], 1: []}
    index, delta = next(stream)
    got[index] += delta.tokens
    inner = engine.generate([ASKED[3].prompt], SamplingParams(max_tokens=ASKED[3].max_tokens, temperature=0))
    assert inner[0].choices[0].tokens == tokens[3]
    for index, delta in stream:
        got[index] += delta.tokens
    assert [got[0], got[1]] == tokens[1:3]
    told = [d for _ in range(20) for d in engine.step()]
    assert {d.request_id for d in told} == {other}
    assert [t for d in told for t in d.tokens] == tokens[0]
    assert all_free(engine)


def test_closing_a_stream_aborts():
    engine = tiny_engine()
    never = engine.stream([[1, 2]], SamplingParams(max_tokens=5))
    never.close()
    assert all_free(engine)
    begun = engine.stream([[1, 2], [3]], SamplingParams(max_tokens=50))
    next(begun)
    begun.close()
    assert all_free(engine)

    def refuse(delta):
        raise KeyError(delta.index)

    with pytest.raises(KeyError):
        engine.generate([[1, 2]], SamplingParams(max_tokens=50), on_delta=refuse)
    assert all_free(engine)


def test_a_step_that_fails_ends_its_requests(monkeypatch):
    engine = tiny_engine()
    engine.add([1, 2, 3], SamplingParams(max_tokens=5))
    monkeypatch.setattr(engine.runner, "run", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert all_free(engine)
    assert [d.finish for d in engine.step()] == [Finish.ABORT]


def test_a_row_without_numbers_ends_alone():
    model = make(llama("tiny", tied_embeddings=False))
    with torch.no_grad():
        model.embed_tokens.weight[3] = float("nan")
    engine = Engine(model.eval(), prefix_caching=False)
    good, bad = engine.generate([[1, 2], [3]], SamplingParams(max_tokens=5, n=2, seed=0, logprobs=1))
    assert [c.finish for c in good.choices] == [Finish.LENGTH] * 2
    assert [(c.finish, c.tokens, c.logprobs) for c in bad.choices] == [(Finish.ERROR, [], [])] * 2
    nothing = SamplingParams(max_tokens=5, logit_bias=dict.fromkeys(range(512), float("-inf")))
    good, none = engine.generate([[1, 2]] * 2, [SamplingParams(max_tokens=5), nothing])
    assert (good.choices[0].finish, none.choices[0].finish) == (Finish.LENGTH, Finish.ERROR)
    assert all_free(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([512], {}, "the prompt holds token id 512; accepted: 0 to vocab_size - 1 = 511"),
        ([1.5], {}, r"the prompt is \[1.5\]; accepted: a text or a sequence of token ids"),
        ("text", {}, "the prompt is text, but the engine has no tokenizer"),
        ([1] * 60, {"max_tokens": 37}, "the prompt has 60 tokens and max_tokens is 37; accepted: together at most 96"),
        ([1] * 96, {}, "accepted: together at most 96"),
        ([1], {"n": 9}, "n is 9; accepted: 1 to max_sequences = 8"),
        ([1], {"logit_bias": {600: 1.0}}, "logit_bias holds token id 600; accepted: 0 to 511"),
        ([1], {"stop_token_ids": {-1}}, "stop_token_ids holds token id -1"),
        ([1], {"stop": "x"}, "stop holds strings, but the engine has no tokenizer"),
        ([1], {"adapter": "x"}, r"adapter is 'x'; accepted: \[\], or None"),
    ],
    ids=str,
)
def test_refuses(prompt, params, message):
    engine = tiny_engine(max_sequences=8)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, SamplingParams(**params))
    assert all_free(engine)


def test_refuses_an_id_in_use():
    engine = tiny_engine()
    assert engine.add([1], request_id="a") == "a"
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        engine.add([1], request_id="a")
    engine.abort("a")
    assert engine.add([1], request_id="a") == "a"
    with pytest.raises(ValueError, match="params has 1 entries; accepted: one, or one for each of 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
