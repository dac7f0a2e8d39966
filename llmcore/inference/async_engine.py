"""The engine for asyncio: one thread steps it, any number of tasks wait for what it gives them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, TypeVar

from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Delta, Request, RequestOutput

Result = TypeVar("Result")


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class EngineFailed(RuntimeError):
    """A step raised; its cause is the exception. Whoever waited is told so, and the engine goes on without them."""


class Running:
    """A request that the engine has taken in: iterate over its deltas; `output` is there after the last one."""

    def __init__(self, owner: AsyncEngine, request_id: str) -> None:
        self.id, self.output = request_id, None
        self.request: Request | None = None  # the worker's; here it is read only when it has ended
        self._owner, self._loop = owner, asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._deltas: deque[Delta] = deque()
        self._ended, self._error = False, None

    def abort(self, error: Exception | None = None) -> None:
        """Ends the request, wherever it is; whoever waits for it gets the error, if there is one. Does nothing for a
        request that has ended."""
        if not self._ended:
            self._ended, self._error = True, error
            self._owner._post(self._owner._abort, self)
            self._ready.set()

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            EngineFailed: where a step raised.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._deltas.popleft()

    def _receive(self, deltas: Iterable[Delta], output: RequestOutput | None, error: Exception | None) -> None:
        """Called in the loop's thread."""
        if not self._ended:
            self._deltas += deltas
            self.output, self._error = output, error
            self._ended = output is not None or error is not None
            self._ready.set()


class AsyncEngine:
    """Runs an engine in a thread of its own, which nobody else may then step.

    Its methods are called from asyncio tasks, of one loop or of several. An error of a step reaches every request that
    was running (`EngineFailed`); the engine then goes on with nothing in it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake = threading.Condition()
        self._ids = itertools.count()
        self._running: dict[str, Running] = {}  # the worker's
        self._closed = self._stopping = False
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._work, name="llmcore-engine", daemon=True)
        self._thread.start()

    # ---- for tasks

    async def submit(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Running:
        """Takes a request in. It runs until it ends or `Running.abort` is called.

        Raises:
            ValueError: as `Engine.add`.
            EngineClosed: when the engine takes no more requests.
        """
        if self._closed:
            raise EngineClosed("the engine is closing; accepted: no more requests")
        running = Running(self, f"async-{next(self._ids)}" if request_id is None else request_id)
        added: asyncio.Future[None] = running._loop.create_future()
        self._post(self._add, running, prompt, params, added)
        try:
            await added
        except asyncio.CancelledError:
            running.abort()
            raise
        return running

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[Delta]:
        """What each step adds to a request. Leaving the loop, or being cancelled in it, aborts the request."""
        running = await self.submit(prompt, params, request_id)
        try:
            async for delta in running:
                yield delta
        finally:
            running.abort()

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> RequestOutput:
        """The whole output of a request. Being cancelled aborts it."""
        running = await self.submit(prompt, params)
        try:
            async for _ in running:
                pass
            return running.output
        finally:
            running.abort()

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """`function(engine)` in the engine's thread, between two steps: for what runs the model or looks into the
        engine. Requests wait meanwhile, so it should be short."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._post(self._call, function, done)
        return await done

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those that run have ended; after `timeout` seconds aborts what is
        left. Whether all have ended by themselves."""
        self._closed = True
        ended = asyncio.create_task(self._idle())
        try:
            await asyncio.wait_for(ended, timeout)
            return True
        except asyncio.TimeoutError:
            with contextlib.suppress(EngineClosed):
                await self.call(lambda _: self._end_all())
            return False
        except EngineClosed:  # the thread has ended, and has told those who waited
            return False

    def _end_all(self) -> None:
        for request_id in list(self.engine.requests):
            self.engine.abort(request_id)
        self._tell_all(EngineClosed("the engine was drained before the request had ended"))

    async def _idle(self) -> None:
        while await self.call(lambda engine: bool(self._running) or engine.has_work):
            await asyncio.sleep(0.02)

    def stats(self) -> Any:
        """`Engine.stats` after the last step."""
        return self._stats

    @property
    def closed(self) -> bool:
        """Whether requests are refused."""
        return self._closed

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread, and what still runs. Waits for the step that is being run."""
        self._closed = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the worker

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        with self._wake:
            if self._stopping and function is not self._abort:
                raise EngineClosed("the engine is closed; accepted: no more calls")
            self._commands.append((function, arguments))
            self._wake.notify()

    def _work(self) -> None:
        error: Exception = EngineClosed("the engine was closed")
        try:
            while self._turn():
                self._stats = self.engine.stats()
        except Exception as fault:  # of the engine's own books: nothing can be run on them
            error = EngineFailed(f"the engine has died: {type(fault).__name__}: {fault}")
            error.__cause__ = fault
        with self._wake:
            self._closed = self._stopping = True
            commands, self._commands = self._commands, deque()
        for _, arguments in commands:
            if arguments and isinstance(arguments[-1], asyncio.Future):
                self._settle(arguments[-1], None, error)
        self._tell_all(error)

    def _turn(self) -> bool:
        """Does what was asked for, and a step; whether to go on."""
        with self._wake:
            while not (self._commands or self._stopping or self.engine.has_work):
                self._wake.wait()
            if self._stopping:
                return False
        while self._commands:
            function, arguments = self._commands.popleft()
            function(*arguments)
        if self.engine.has_work:
            self._step()
        return True

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception as error:  # whatever it is: those who wait must not wait for ever
            failed = EngineFailed(f"a step of the engine failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._tell_all(failed)
            for request_id in list(self.engine.requests):
                self.engine.abort(request_id)
            return
        of_request: dict[str, list[Delta]] = {}
        for delta in deltas:
            of_request.setdefault(delta.request_id, []).append(delta)
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple]] = {}
        for request_id, mine in of_request.items():
            if running := self._running.get(request_id):
                output = None
                if request_id not in self.engine.requests:
                    output = running.request.result()
                    del self._running[request_id]
                of_loop.setdefault(running._loop, []).append((running, mine, output, None))
        for loop, messages in of_loop.items():
            self._tell(loop, messages)

    def _tell(self, loop: asyncio.AbstractEventLoop, messages: list[tuple]) -> None:
        try:
            loop.call_soon_threadsafe(_deliver, messages)
        except RuntimeError:  # the loop is closed, and with it all that waited there
            for running, *_ in messages:
                self._abort(running)

    def _tell_all(self, error: Exception) -> None:
        """Every request that waits gets the error."""
        failed, self._running = self._running, {}
        for running in failed.values():
            self._tell(running._loop, [(running, [], None, error)])

    def _add(
        self, running: Running, prompt: str | Sequence[int], params: SamplingParams | None, added: asyncio.Future
    ) -> None:
        try:
            self.engine.add(prompt, params, running.id)
            running.request = self.engine.requests[running.id]
            self._running[running.id] = running
        except Exception as error:
            self._settle(added, None, error)
        else:
            self._settle(added, None, None)

    def _abort(self, running: Running) -> None:
        if self._running.get(running.id) is running:  # not another of the same name
            del self._running[running.id]
            self.engine.abort(running.id)

    def _call(self, function: Callable[[Engine], Any], done: asyncio.Future) -> None:
        try:
            self._settle(done, function(self.engine), None)
        except Exception as error:
            self._settle(done, None, error)

    def _settle(self, future: asyncio.Future, result: Any, error: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def _deliver(messages: list[tuple]) -> None:
    for running, deltas, output, error in messages:
        running._receive(deltas, output, error)


def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
