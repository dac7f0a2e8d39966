"""Runs the application in this process until it is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

_SPARE = 2.0  # seconds between the requests' last moment and that of the process


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        """When their time is up, requests that still run are told so: 503, or an error in the stream."""
        served = self.config.app.state.served
        await asyncio.sleep(served.limits.drain_timeout)
        if served.engine is not None:
            await served.engine.drain(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From now on requests on open connections get 503, and so does /health."""
        self.config.app.state.served.gate.closed = True
        super().handle_exit(sig, frame)


def serve(app: FastAPI, host: str, port: int, say: Callable[[str], None]) -> int:
    """Serves until SIGTERM or Ctrl-C: then no connection is taken any more, the requests that run may end within
    `Limits.drain_timeout`, and the rest is ended. The exit code: 0, or 130 for Ctrl-C.

    Raises:
        OSError: when the address can't be had.
    """
    sockets = [_listen(host, port)]
    where = sockets[0].getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    served = app.state.served
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=max(1, round(served.limits.drain_timeout + _SPARE)),
    )  # fmt: skip
    server = _Server(config, lambda: say(f"serving {served.name} at http://{shown}:{where[1]}"))
    # before uvicorn has taken the signal over; and when it is done it raises it again, for whoever had it before
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    try:
        server.run(sockets=sockets)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host is {host!r}: {error}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(f"can't listen at {host}:{port}: {error}") from None
    return listening
