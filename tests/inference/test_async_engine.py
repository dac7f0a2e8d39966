"""The engine behind asyncio: the same outputs, aborts, errors, and draining."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

from llmcore.inference.async_engine import AsyncEngine, EngineClosed, EngineFailed
from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Finish
from llmcore.models import Transformer, llama

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [3], list(range(20, 60))]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
LONG = SamplingParams(max_tokens=400, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(llama("tiny", vocab_size=96, max_positions=512))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def asynchronous(model):
    engine = AsyncEngine(Engine(model, cache_tokens=4096))
    yield engine
    engine.close()
    assert not engine.alive


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until_idle(engine):
    """Blocks held by nobody: what was aborted has given its back."""
    while (stats := engine.stats()).blocks_used or stats.running or stats.waiting:
        await asyncio.sleep(0.01)


def test_outputs_are_the_engines(model, asynchronous):
    wanted = Engine(model, cache_tokens=4096).generate(PROMPTS, GREEDY)

    async def main():
        return await asyncio.gather(*(asynchronous.generate(prompt, GREEDY) for prompt in PROMPTS))

    for got, expected in zip(run(main()), wanted):
        assert got.choices == expected.choices
        assert got.prompt_tokens == expected.prompt_tokens


def test_streams(model, asynchronous):
    (wanted,) = Engine(model, cache_tokens=4096).generate([PROMPTS[0]], GREEDY)

    async def main():
        return [delta async for delta in asynchronous.stream(PROMPTS[0], GREEDY, "mine")]

    deltas = run(main())
    assert [token for delta in deltas for token in delta.tokens] == wanted.choices[0].tokens
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert [delta.finish for delta in deltas][-1] is Finish.LENGTH
    assert len(deltas) > 10


def test_bad_requests_raise_before_anything_runs(asynchronous):
    async def main():
        for prompt in ([], [1000], "text", [0] * 600):
            with pytest.raises(ValueError, match="prompt"):
                await asynchronous.generate(prompt, GREEDY)
        running = await asynchronous.submit([1], LONG, "same")
        with pytest.raises(ValueError, match="in use"):
            await asynchronous.submit([1], LONG, "same")
        running.abort()
        await until_idle(asynchronous)

    run(main())


def test_leaving_the_loop_aborts(asynchronous):
    async def main():
        async for delta in asynchronous.stream([1, 2], LONG):
            assert delta.tokens
            break
        gc.collect()
        await until_idle(asynchronous)

    run(main())
    assert asynchronous.stats().tokens_generated < 400


def test_cancelling_aborts(asynchronous):
    async def main():
        tasks = [asyncio.create_task(asynchronous.generate([i + 1], LONG)) for i in range(8)]
        for delay, task in enumerate(tasks):  # some before they were added, some while they run
            await asyncio.sleep(0.004 * delay)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await until_idle(asynchronous)

    run(main())
    assert asynchronous.engine.requests == {}


def test_an_abort_with_an_error(asynchronous):
    async def main():
        running = await asynchronous.submit([1], LONG)
        await running.__anext__()
        running.abort(TimeoutError("too late"))
        with pytest.raises(TimeoutError, match="too late"):
            async for _ in running:
                pass
        running.abort()
        await until_idle(asynchronous)

    run(main())


def test_an_error_of_a_step_reaches_everybody(model, asynchronous):
    step, steps = asynchronous.engine.step, 0

    def broken():
        nonlocal steps
        steps += 1
        if steps == 5:
            raise MemoryError("planted")
        return step()

    asynchronous.engine.step = broken

    async def main():
        tasks = [asynchronous.generate(prompt, LONG) for prompt in PROMPTS]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineFailed)
            assert "MemoryError: planted" in str(result)
            assert isinstance(result.__cause__, MemoryError)
        await until_idle(asynchronous)
        return await asynchronous.generate(PROMPTS[0], GREEDY)  # and it goes on

    assert run(main()).choices == Engine(model, cache_tokens=4096).generate([PROMPTS[0]], GREEDY)[0].choices


def test_a_dead_engine_leaves_nobody_waiting(asynchronous):
    def broken(*_):
        raise RuntimeError("planted")

    asynchronous.engine.step = asynchronous.engine.abort = broken

    async def main():
        with pytest.raises(EngineFailed, match="planted"):
            await asynchronous.generate([1], GREEDY)
        while asynchronous.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineClosed):
            await asynchronous.generate([1], GREEDY)
        with pytest.raises(EngineClosed):
            await asynchronous.call(lambda _: None)
        assert not await asynchronous.drain(1)

    run(main())


def test_calls_run_between_steps(asynchronous):
    async def main():
        running = asyncio.create_task(asynchronous.generate([1], LONG))
        names = {await asynchronous.call(lambda _: threading.current_thread().name) for _ in range(5)}
        assert names == {"llmcore-engine"}
        with pytest.raises(ZeroDivisionError):
            await asynchronous.call(lambda _: 1 // 0)
        assert len((await running).choices[0].tokens) == 400

    run(main())


def test_drain_waits(asynchronous):
    async def main():
        running = asyncio.create_task(asynchronous.generate([1], LONG))
        await asyncio.sleep(0.01)
        assert await asynchronous.drain(30)
        assert len((await running).choices[0].tokens) == 400
        with pytest.raises(EngineClosed):
            await asynchronous.generate([1], GREEDY)

    run(main())


def test_drain_ends_what_is_left(asynchronous):
    async def main():
        running = asyncio.create_task(asynchronous.generate([1], LONG))
        await asyncio.sleep(0.01)
        assert not await asynchronous.drain(0.02)
        with pytest.raises(EngineClosed):
            await running
        await until_idle(asynchronous)

    run(main())


def test_several_loops(model, asynchronous):
    (wanted,) = Engine(model, cache_tokens=4096).generate([PROMPTS[1]], GREEDY)
    outputs = []
    threads = [
        threading.Thread(target=lambda: outputs.append(run(asynchronous.generate(PROMPTS[1], GREEDY))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.choices for output in outputs] == [wanted.choices] * 3


def test_a_loop_that_is_gone(asynchronous):
    """A request whose loop was closed under it is aborted, and others go on."""

    async def start():
        return await asynchronous.submit([1], LONG)

    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(start())
    loop.close()
    run(until_idle(asynchronous))
    assert kept.output is None
    assert run(asynchronous.generate([1], GREEDY)).choices
