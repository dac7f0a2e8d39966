"""The scheduler and the cache's bookkeeping, driven by any requests and checked against what they promise: nothing
leaks, nothing is given twice, the order holds, and everything ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.inference import PagedKVCache, SamplingParams
from llmcore.inference.engine import Engine
from llmcore.inference.runner import Drawn
from llmcore.inference.scheduler import Scheduler
from llmcore.inference.speculation import Speculator
from llmcore.models import ModelConfig, Transformer

CONFIG = ModelConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, max_positions=64)
MODEL = Transformer(CONFIG).eval()


class FakeRunner:
    """In place of the model: a token is a function of those before it. Keeps its own account of what each sequence has
    in the cache, and refuses whatever does not follow from it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def run(self, work):
        cache, scheduler = self.engine.cache, self.engine.scheduler
        sequences = [w.sequence for w in work]
        assert len(set(sequences)) == len(sequences)
        assert sum(w.tokens for w in work) <= scheduler.max_batch_tokens
        assert len(scheduler.running) + sum(s.forks_to_come for s in scheduler.running) <= scheduler.max_sequences
        for w in work:
            assert w.sequence in scheduler.running
            assert cache.length(w.sequence.id) == w.sequence.computed
            assert 1 <= w.count <= w.sequence.remaining
            assert w.draws == (w.count == w.sequence.remaining)
        cache.extend([s.id for s in sequences], [w.tokens for w in work])  # raises where blocks are lacking
        drawn = {}
        for w in work:
            if w.draws:
                for sibling in w.siblings:
                    drawn[sibling] = Drawn([self.token(sibling, sibling.tokens)], [])
                tokens, context = [], list(w.sequence.tokens)
                for draft in [*w.sequence.drafts, None]:
                    tokens.append(self.token(w.sequence, context))
                    context.append(tokens[-1])
                    if tokens[-1] != draft:
                        break
                drawn[w.sequence] = Drawn(tokens, [])
        return drawn

    @staticmethod
    def token(sequence, tokens):
        return (sum(tokens) + len(tokens) + sequence.index) % 8


class Guesser(Speculator):
    """Drafts of which some are right, for any engine."""

    def attach(self, model):
        pass

    def propose(self, sequences, counts):
        drafts = []
        for sequence, count in zip(sequences, counts):
            context = list(sequence.tokens)
            for _ in range(min(count, 3)):
                context.append(FakeRunner.token(sequence, context) if len(context) % 4 else 0)
            drafts.append(context[len(sequence.tokens) :])
        return drafts


def alone(prompt, index, max_tokens, stop):
    tokens = list(prompt)
    sequence = SimpleNamespace(index=index)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(FakeRunner.token(sequence, tokens))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


@st.composite
def workloads(draw):
    """Options of an engine with a small cache, and requests that it can hold: (step of arrival, prompt, max_tokens, n,
    steps until it is aborted)."""
    blocks, size = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    max_sequences = draw(st.integers(1, 6))
    room = min(blocks * size, CONFIG.max_positions)
    options = {
        "cache_tokens": blocks * size,
        "block_size": size,
        "max_sequences": max_sequences,
        "max_batch_tokens": max_sequences + draw(st.integers(1, 12)),
        "preemption": draw(st.sampled_from(["recompute", "swap"])),
        "prefix_caching": draw(st.booleans()),
        "speculator": draw(st.sampled_from([None, Guesser()])),
    }
    asked = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, room - 1))
        prompt = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        asked.append((
            draw(st.integers(0, 12)), prompt, draw(st.integers(1, room - length)),
            draw(st.integers(1, max_sequences)), draw(st.one_of(st.none(), st.integers(0, 20))),
        ))  # fmt: skip
    return options, sorted(asked, key=lambda a: a[0])


def check_order(engine):
    """All that run come before all that wait, in the order of requests and choices; blocks are held or free."""
    scheduler, cache = engine.scheduler, engine.cache
    order = [(int(s.request.id), s.index) for s in [*scheduler.running, *scheduler.waiting]]
    assert order == sorted(set(order))
    assert set(cache.sequences) == {s.id for s in scheduler.running}
    held = {b for s in scheduler.running for b in cache.blocks(s.id)}
    assert cache.num_free_blocks == cache.num_blocks - len(held)


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_everything_ends_and_nothing_leaks(workload):
    options, asked = workload
    engine = Engine(MODEL, stop_ids=[7], **options)
    engine.runner = FakeRunner(engine)
    bound = sum(n * (len(prompt) + max_tokens) for _, prompt, max_tokens, n, _ in asked)
    left, step, got, aborted = list(enumerate(asked)), 0, {}, set()
    while left or engine.has_work:
        while left and left[0][1][0] <= step:
            i, (_, prompt, max_tokens, n, _) = left.pop(0)
            engine.add(prompt, SamplingParams(max_tokens=max_tokens, n=n), str(i))
            got |= {(i, index): [] for index in range(n)}
        for i, (arrival, *_, patience) in enumerate(asked):
            if patience is not None and arrival + patience == step and str(i) in engine.requests:
                aborted.add(i)
                engine.abort(str(i))
        for delta in engine.step():
            got[int(delta.request_id), delta.index] += delta.tokens
        check_order(engine)
        step += 1
        assert step <= bound + 13, "no progress"
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    assert not engine.cache.sequences
    for (i, index), tokens in got.items():
        _, prompt, max_tokens, _, _ = asked[i]
        whole = alone(prompt, index, max_tokens, stop=7)
        assert tokens == (whole[: len(tokens)] if i in aborted else whole)


def test_refuses_options():
    cache = PagedKVCache(CONFIG, 4)
    with pytest.raises(ValueError, match="max_sequences is 4, max_batch_tokens 4; accepted: 1 or more, and more"):
        Scheduler(cache, max_batch_tokens=4, max_sequences=4)
    with pytest.raises(ValueError, match="preemption is 'drop'; accepted: 'recompute', 'swap'"):
        Scheduler(cache, max_batch_tokens=4, max_sequences=2, preemption="drop")


def test_a_beginning_in_common_is_run_once():
    """Prompts that come at once and begin alike: the others wait for the first one's step and find it."""
    engine = Engine(MODEL, cache_tokens=512, block_size=4, max_batch_tokens=256, max_sequences=8)
    engine.runner = FakeRunner(engine)
    shared = [token % 7 for token in range(40)]
    prompts = [[*shared, own, 7] for own in range(6)] + [[7] * 42]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=3, temperature=0))
    assert engine.stats().tokens_prefilled == 42 + 5 * 2 + 42
    assert [output.cached_tokens for output in outputs] == [0, *[40] * 5, 0]


def test_a_short_beginning_in_common_delays_nobody():
    engine = Engine(MODEL, cache_tokens=512, block_size=4, max_batch_tokens=256, max_sequences=8)
    engine.runner = FakeRunner(engine)
    prompts = [[1, 2, 3, 4, *[own] * 20] for own in range(4)]
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=2, temperature=0))
    assert len(engine.step()) == 4
