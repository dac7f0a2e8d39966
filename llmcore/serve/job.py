"""What serves requests, and one request on its way through it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from llmcore.inference.async_engine import AsyncEngine, EngineClosed, EngineFailed, Running
from llmcore.inference.language_model import LanguageModel
from llmcore.inference.params import SamplingParams
from llmcore.inference.sequence import Delta, Finish
from llmcore.serve.errors import ApiError, timed_out, unavailable
from llmcore.serve.limits import Gate, Limits
from llmcore.serve.metrics import Metrics


@contextlib.contextmanager
def for_clients() -> Iterator[None]:
    """The engine's errors as those of the API."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ApiError(str(error), code="invalid_value") from None
    except EngineFailed as error:
        raise unavailable(str(error), "engine_failed") from error
    except EngineClosed:
        raise unavailable("the server is shutting down", "shutting_down") from None


@dataclass
class Served:
    """A model and all that stands around it.

    Attributes:
        name: of the model, for clients.
        language_model, engine: what writes; None where the model only embeds.
        embedder: makes vectors of texts; None: embeddings are refused.
        tool_parser: one of `tool_parsers.TOOL_PARSERS`.
        reasoning: whether `<think>` ... `</think>` is told apart from the answer.
    """

    name: str
    language_model: LanguageModel | None
    engine: AsyncEngine | None
    embedder: Any
    limits: Limits
    gate: Gate
    metrics: Metrics
    tool_parser: str = "hermes"
    reasoning: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def adapters(self) -> list[str]:
        """Names of the LoRA adapters, which are models too to a client."""
        return sorted(getattr(self.engine.engine, "adapters", None) or {}) if self.engine else []

    @property
    def capacity(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        return self.engine.engine.max_length

    def adapter(self, model: str) -> str | None:
        """The adapter that a request's `model` means. 404 for a name that is not served."""
        if model == self.name:
            return None
        if model in self.adapters:
            return model
        message = f"model is {model[:200]!r}; accepted: {', '.join(map(repr, [self.name, *self.adapters]))}"
        raise ApiError(message, status=404, param="model", code="model_not_found")


class Job:
    """What a client has asked for. Whatever it has put into the engine ends when the job is left."""

    def __init__(self, served: Served) -> None:
        self.served, self.running = served, []
        self._started = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Job:
        self._timer = asyncio.get_running_loop().call_later(self.served.limits.timeout, self._expire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        for running in self.running:
            running.abort()

    def _expire(self) -> None:
        for running in self.running:
            running.abort(timed_out(self.served.limits.timeout))

    async def submit(self, prompt: Sequence[int], params: SamplingParams) -> Running:
        """Puts a request into the engine. 400 for what the engine refuses."""
        with for_clients():
            running = await self.served.engine.submit(prompt, params)
        self.running.append(running)
        return running

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What the engine adds to all that was submitted, with the number of the prompt.

        Raises:
            ApiError: 503 when the engine fails or ends, 408 when the time is up.
        """
        if len(self.running) == 1:
            async for delta in self._watched(self.running[0]):
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(64)
        tasks = [asyncio.create_task(self._forward(i, r, queue)) for i, r in enumerate(self.running)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, index: int, running: Running, queue: asyncio.Queue) -> None:
        try:
            async for delta in self._watched(running):
                await queue.put((index, delta))
            await queue.put(None)
        except ApiError as error:
            await queue.put(error)

    async def _watched(self, running: Running) -> AsyncIterator[Delta]:
        """The deltas of one, with errors for the client and the times for Prometheus."""
        metrics, first, counts = self.served.metrics, {}, {}
        with for_clients():
            async for delta in running:
                now = time.monotonic()
                if delta.tokens:
                    if not first:
                        metrics.first_token.observe(now - self._started)
                    first.setdefault(delta.index, now)
                    counts[delta.index] = counts.get(delta.index, 0) + len(delta.tokens)
                if delta.finish is Finish.ERROR:
                    raise unavailable("no token could be drawn: the model's logits are no numbers, or nothing is "
                                      "allowed", "generation_failed")  # fmt: skip
                if delta.finish is not None and counts.get(delta.index, 0) > 1:
                    metrics.per_token.observe((now - first[delta.index]) / (counts[delta.index] - 1))
                yield delta

    def usage(self) -> dict[str, Any]:
        """The tokens of all that was submitted, once it has ended."""
        outputs = [running.output for running in self.running]
        prompt = sum(len(output.prompt_tokens) for output in outputs)
        written = sum(len(choice.tokens) for output in outputs for choice in output.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
        }
