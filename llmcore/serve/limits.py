"""Who may ask, how much at a time, and how large: before a body is read, let alone parsed."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from llmcore.serve.errors import ApiError, unavailable

Result = TypeVar("Result")
_DISCARDED = 32 << 20  # bytes of a body that is too large


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        api_keys: one of them must come as `Authorization: Bearer KEY`; without any, everybody may ask.
        max_requests: that are being served at a time, those that wait in the engine among them; more get 503.
        max_body: bytes of a body; larger ones get 413.
        max_tokens: the most new tokens of a choice; None: what the context holds.
        max_choices: of a request: prompts times n.
        max_inputs: texts of one request for embeddings.
        timeout: seconds for a request, waiting included; then 408, or an error in the stream.
        body_timeout: seconds for a body to arrive; then 408.
        drain_timeout: seconds that requests get to end when the server is told to.
    """

    api_keys: frozenset[str] = frozenset()
    max_requests: int = 256
    max_body: int = 4 << 20
    max_tokens: int | None = None
    max_choices: int = 64
    max_inputs: int = 256
    timeout: float = 600.0
    body_timeout: float = 30.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        whole = ("max_requests", "max_body", "max_tokens", "max_choices", "max_inputs")
        for name in (*whole, "timeout", "body_timeout", "drain_timeout"):
            value = getattr(self, name)
            if not (value is None and name == "max_tokens") and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; accepted: above 0")
        if wrong := [key for key in self.api_keys if not key or not key.isascii() or key != key.strip()]:
            raise ValueError(f"an API key of {len(wrong[0])} characters is no ASCII without spaces around it")


def check_key(request: Request, limits: Limits) -> None:
    """401 without one of the keys. Takes the same time for any wrong key."""
    if not limits.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in limits.api_keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(
            "the Authorization header holds no key of this server; accepted: Bearer KEY", status=401,
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


class Gate:
    """Counts requests in, and turns away those that are too many, or come after the server was told to end."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.inside, self.closed = limits, 0, False

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        if self.closed:
            raise unavailable("the server is shutting down", "shutting_down")
        if self.inside >= self.limits.max_requests:
            message = f"{self.inside} requests are being served; accepted: {self.limits.max_requests} at a time"
            raise unavailable(message, "overloaded")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, if it is JSON by its own account, not too large, and there in time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site can't send without asking
        message = f"content-type is {kind!r}; accepted: application/json"
        raise ApiError(message, status=415, code="unsupported_media_type")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:19]) > limits.max_body:
        await _discard(request)
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_collect(request, limits), limits.body_timeout)
    except asyncio.TimeoutError:
        message = f"the body was not there within {limits.body_timeout:g} s"
        raise ApiError(message, status=408, code="timeout", headers={"Connection": "close"}) from None


async def _collect(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in _chunks(request):
        body += chunk
        if len(body) > limits.max_body:
            body.clear()
            await _discard(request)
            raise _too_large(limits)
    return bytes(body)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The rest of the body. (`Request.stream` can be begun only once.)"""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _discard(request: Request) -> None:
    """Lets the rest of a body pass for a moment: a client that is still sending would not see the answer."""

    async def read() -> None:
        count = 0
        async for chunk in _chunks(request):
            count += len(chunk)
            if count > _DISCARDED:
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), 2.0)


def _too_large(limits: Limits) -> ApiError:
    # the rest of the body is not read, so the connection can't serve another request
    return ApiError(f"the body is too large; accepted: {limits.max_body} bytes", status=413, code="body_too_large",
                    headers={"Connection": "close"})  # fmt: skip


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives. It is cancelled when the client goes away (`ClientDisconnect`). The body has been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
