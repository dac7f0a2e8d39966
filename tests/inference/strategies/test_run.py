"""Strategies on a real engine: specs, shared blocks, seeds, counted tokens, and beside other requests."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import torch

from llmcore.inference.async_engine import AsyncEngine
from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Completion, Finish, RequestOutput
from llmcore.inference.strategies import (
    SCORERS,
    STRATEGIES,
    Ask,
    StrategyFailed,
    check_spec,
    drive,
    drive_async,
    problem_for,
    run_strategy,
    run_strategy_async,
    self_consistency,
    steps_of,
    token_bound,
)
from llmcore.models import Transformer, llama
from llmcore.tokenizers import train_tokenizer
from tests.inference.strategies.fakes import FakeEngine, answering, problem

TOKENIZER = train_tokenizer([], kind="byte", special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
TABLE = {
    "edges": [0.6],
    "options": [
        {"spec": {"name": "self-consistency", "n": n}, "accuracy": [0.1 * n] * 2, "tokens": [8.0 * n] * 2,
         "questions": [1, 1]} for n in (1, 4)
    ],
}  # fmt: skip
SPECS = [
    {"name": "chain-of-thought"},
    {"name": "self-consistency", "n": 6},
    {"name": "best-of-n", "n": 6},
    {"name": "best-of-n", "n": 4, "scorer": "verify", "weighted": True},
    {"name": "beam-search", "num_beams": 3},
    {"name": "step-search", "n": 4, "width": 2, "lookahead": 1, "step_end": "e", "max_step_tokens": 4, "max_steps": 3},
    {"name": "self-refine", "rounds": 2},
    {"name": "budget-forcing", "max_thinking": 16, "waits": 2, "end": "e", "begin": "", "wait": "W", "answer": ""},
    {"name": "compute-optimal", "table": TABLE, "budget": 100, "pilot": 3},
]
NAMES = [spec["name"] for spec in SPECS]
CHAT = [{"role": "user", "content": "How many? " * 4}]
PARAMS = SamplingParams(max_tokens=8, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(llama("tiny", vocab_size=TOKENIZER.vocab_size, max_positions=512))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


class Counting(Engine):
    """Knows the most blocks and sequences that it ever held."""

    most_blocks = most_running = 0

    def _step(self):
        super()._step()
        stats = self.stats()
        self.most_blocks = max(self.most_blocks, stats.blocks_used)
        self.most_running = max(self.most_running, stats.running)


def make_engine(model, **options):
    return Counting(model, TOKENIZER, **{"cache_tokens": 4096, "block_size": 4, "max_sequences": 16, **options})


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_every_strategy_on_an_engine(model, spec):
    engine = make_engine(model)
    result = run_strategy(engine, CHAT, spec, PARAMS)
    assert result.strategy == spec["name"]
    assert result.usage.generated_tokens == engine.stats().tokens_generated
    assert 0 < engine.stats().tokens_generated <= token_bound(spec, 8)
    assert result.curve
    assert [p.tokens for p in result.curve] == sorted(p.tokens for p in result.curve)
    assert result.curve[-1].tokens <= engine.stats().tokens_generated
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    assert isinstance(result.to_dict(candidates=True)["candidates"], list)
    again = run_strategy(make_engine(model, prefix_caching=False), CHAT, spec, PARAMS)
    assert again.chosen.tokens == result.chosen.tokens  # by its seeds
    assert again.usage.cached_tokens == 0


def test_all_are_listed():
    assert set(NAMES) == set(STRATEGIES)
    assert all(strategy.__doc__ for strategy in STRATEGIES.values())


def test_samples_share_the_blocks_of_the_prompt(model):
    engine = make_engine(model)
    task = problem_for(engine, CHAT)
    blocks = -(-len(task.tokens) // 4)
    assert blocks > 12
    drive(engine, self_consistency(task, PARAMS, n=8))
    assert engine.most_running == 8
    assert engine.most_blocks <= blocks + 8 * 3  # 8 tokens, and what the last block of the prompt holds, each


def test_more_samples_than_the_engine_runs_at_a_time(model):
    """They are the same as when all run together."""
    few = make_engine(model, max_sequences=3)
    assert [ask.params.n for ask in self_consistency(problem_for(few, CHAT), PARAMS, n=8).send(None)] == [3, 3, 2]
    spec = {"name": "self-consistency", "n": 8}
    results = [run_strategy(engine, CHAT, spec, PARAMS) for engine in (few, make_engine(model))]
    assert few.most_running == 3
    texts = [[c.tokens for c in result.candidates] for result in results]
    assert texts[0] == texts[1]
    assert len({tuple(tokens) for tokens in texts[0]}) == 8


def test_largest_seed():
    for seed in (2**64 - 1, -(2**63)):
        steps = self_consistency(problem(max_choices=2), SamplingParams(max_tokens=4, seed=seed), n=5)
        seeds = [ask.params.seed % 2**64 for ask in steps.send(None)]
        assert seeds == [(seed + i) % 2**64 for i in (0, 2, 4)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "strategy is None; accepted: an object with 'name' and settings"),
        ([], r"strategy is \[\]; accepted"),
        ({}, "the strategy's name is None; accepted: 'beam-search', 'best-of-n'"),
        ({"name": ["x"]}, r"the strategy's name is \['x'\]"),
        ({"name": "self-consistency", "m": 3}, "'m' is no setting of self-consistency; accepted: ex"),
        ({"name": "self-consistency", "n": 0}, "n of self-consistency is 0; accepted: 1 to 128"),
        ({"name": "self-consistency", "n": 10**9}, "n of self-consistency is 1000000000"),
        ({"name": "self-consistency", "n": True}, "n of self-consistency is True"),
        ({"name": "self-consistency", "n": "8"}, "n of self-consistency is '8'"),
        ({"name": "self-consistency", "extract": "regex"}, "extract of self-consistency is 'regex'; accepted: 'auto'"),
        ({"name": "self-consistency", "extract": ["auto"]}, "extract of self-consistency is"),
        ({"name": "self-consistency", "instruction": "x" * 5000}, "accepted: a text of 1 to 4096 characters, or None"),
        ({"name": "best-of-n", "scorer": "mine"}, "scorer of best-of-n is 'mine'; accepted: 'probability', 'verify'"),
        ({"name": "best-of-n", "weighted": 1}, "weighted of best-of-n is 1; accepted: true, false"),
        ({"name": "beam-search", "length_penalty": float("nan")}, "length_penalty of beam-search is nan"),
        ({"name": "beam-search", "length_penalty": 10**400}, r"length_penalty of beam-search is 10{96}\.\.\.;"),
        ({"name": "step-search", "n": 6, "width": 4}, "accepted: a multiple of the width"),
        ({"name": "step-search", "step_end": ""}, "step_end of step-search is ''"),
        ({"name": "budget-forcing", "waits": -1}, "waits of budget-forcing is -1; accepted: 0 to 64"),
        ({"name": "compute-optimal", "budget": 9}, "compute-optimal needs table"),
        ({"name": "compute-optimal", "budget": 9, "table": "/etc/passwd"}, "the table is '/etc/passwd'; accepted: an"),
    ],
)  # fmt: skip
def test_specs_are_checked_before_anything_runs(spec, message):
    with pytest.raises(ValueError, match=message):
        check_spec(spec)
    with pytest.raises(ValueError, match=message):
        steps_of(problem(), spec)
    with pytest.raises(ValueError, match=message):
        token_bound(spec, 10)


def test_params_of_a_strategy_ask_for_one_choice(model):
    with pytest.raises(ValueError, match="n of the sampling params is 2; accepted with a strategy: 1"):
        run_strategy(make_engine(model), CHAT, SPECS[0], SamplingParams(n=2))


def test_prompts_that_do_not_fit(model):
    engine = make_engine(model, cache_tokens=64)
    with pytest.raises(ValueError, match="accepted: together at most 64"):
        run_strategy(engine, CHAT, SPECS[1], SamplingParams(max_tokens=60))
    assert engine.cache.num_free_blocks == engine.cache.num_blocks


def test_scorers_by_name():
    """A server's own scorers have names that its clients may use."""
    best = {"2": lambda problem, candidates: [float(c.answer == "2") for c in candidates]}
    steps = steps_of(problem(), {"name": "best-of-n", "n": 20, "scorer": "2"}, scorers=best)
    assert drive(FakeEngine(answering({"1": 0.8, "2": 0.2})), steps).answer == "2"
    with pytest.raises(ValueError, match="scorer of best-of-n is '3'"):
        steps_of(problem(), {"name": "best-of-n", "scorer": "3"}, scorers=best)


def test_self_verification_reads_yes_and_no():
    """The probability of Yes beside that of No, whatever their spelling, from one token after each candidate."""
    from llmcore.inference.sequence import TokenLogprob

    words = {"Yes": 0.3, " yes": 0.2, " no": 0.25, " maybe": 0.25}
    tokenizer = train_tokenizer(["Yes", " yes", " no", " maybe"] * 50, vocab_size=300)

    class Judge:
        def generate(self, prompts, params):
            return [self.answer(prompt, p) for prompt, p in zip(prompts, params)]

        def answer(self, prompt, params):
            if params.max_tokens != 1:
                choices = [Completion(i, f"it is {i}", [5, 6], None, Finish.STOP) for i in range(params.n)]
                return RequestOutput("a", prompt, choices)
            assert "Is this answer correct?" in tokenizer.decode(prompt)
            sure = "it is 1" in tokenizer.decode(prompt)
            top = {tokenizer.encode(w)[0]: float(torch.tensor(p if sure else 1 - p).log()) for w, p in words.items()}
            told = [TokenLogprob(5, -1.0, 1, top)]
            return RequestOutput("b", prompt, [Completion(0, "Yes", [5], told, Finish.LENGTH)])

    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    task = problem().__class__.of("Q", tokenizer)
    steps = STRATEGIES["best-of-n"](task, SamplingParams(max_tokens=4), n=2, scorer="verify")
    result = drive(Judge(), steps)
    assert [c.score for c in result.candidates] == pytest.approx([1.5 / 2.25, 0.5 / 0.75])
    assert result.usage.generated_tokens == 2 * 2 + 2
    assert set(SCORERS) == {"probability", "verify"}


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.ABORT])
def test_a_request_that_fails(finish):
    class Broken:
        def generate(self, prompts, params):
            return [RequestOutput("a", prompt, [Completion(0, "", [], None, finish)]) for prompt in prompts]

    with pytest.raises(StrategyFailed, match="a request of the strategy"):
        drive(Broken(), self_consistency(problem(), PARAMS, n=1))


# ---- beside other requests


class Async:
    """What strategies use of an AsyncEngine: requests that end some turns of the loop later."""

    def __init__(self, engine) -> None:
        self.engine, self.open, self.cancelled, self.most_open = engine, 0, 0, 0

    async def generate(self, prompt, params):
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0.01)
            return self.engine.generate([prompt], [params])[0]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_asynchronous_is_the_same(model, spec):
    expected = run_strategy(make_engine(model), CHAT, spec, PARAMS)
    result = asyncio.run(run_strategy_async(Async(make_engine(model)), CHAT, spec, PARAMS))
    assert result.chosen == expected.chosen
    assert result.usage.generated_tokens == expected.usage.generated_tokens


def test_a_slow_scorer_holds_nobody_up():
    """The scorer waits for what only the event loop can do."""
    begun, released = threading.Event(), threading.Event()

    def slow(problem, candidates):
        begun.set()
        assert released.wait(60)
        return [1.0] * len(candidates)

    async def main():
        steps = STRATEGIES["best-of-n"](problem(), SamplingParams(max_tokens=64), n=2, scorer=slow)
        running = asyncio.create_task(drive_async(Async(FakeEngine(answering({"1": 1.0}))), steps))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        released.set()
        return await running

    assert asyncio.run(main()).answer == "1"


def test_cancelling_and_failing_abort_what_is_open(model):
    async def cancelled(engine):
        steps = self_consistency(problem_for(engine.engine, CHAT), PARAMS, n=12)
        running = asyncio.create_task(drive_async(engine, steps))
        while engine.open < 4:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0)

    engine = Async(make_engine(model, max_sequences=3))
    asyncio.run(cancelled(engine))
    assert (engine.open, engine.cancelled) == (0, 4)

    async def failing(engine):
        def steps():
            yield [Ask([5], SamplingParams(max_tokens=4)), Ask([10**6], SamplingParams(max_tokens=4))]

        with pytest.raises(ValueError, match="token id 1000000"):
            await drive_async(engine, steps())
        await asyncio.sleep(0.05)

    engine = Async(make_engine(model))
    asyncio.run(failing(engine))
    assert engine.open == 0


def test_on_the_asynchronous_engine(model):
    """All strategies at a time beside a stream: each gives what it gives alone, and nothing is left in the cache."""
    expected = [run_strategy(make_engine(model), CHAT, spec, PARAMS).chosen.tokens for spec in SPECS]
    engine = make_engine(model)

    async def main():
        running = AsyncEngine(engine)
        beside = [delta async for delta in running.stream([5, 6, 7], SamplingParams(max_tokens=4))]
        results = await asyncio.gather(*(run_strategy_async(running, CHAT, spec, PARAMS) for spec in SPECS))
        long = dataclasses.replace(PARAMS, max_tokens=64, ignore_eos=True)  # of many steps, so that one is seen
        cancelled = asyncio.create_task(run_strategy_async(running, CHAT, {"name": "self-consistency", "n": 8}, long))
        while not running.stats().running and not cancelled.done():
            await asyncio.sleep(0.001)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await running.drain(60)
        running.close()
        return beside, results

    beside, results = asyncio.run(main())
    assert sum(len(delta.tokens) for delta in beside) == 4
    assert [result.chosen.tokens for result in results] == expected
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
