"""The end of a server: it takes nothing new, lets requests end, and exits with 0."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time

import pytest

from tests.serve.running import ECHO, SERVE

openai = pytest.importorskip("openai")

TEXT = "the cat sat on the mat and saw a rat run over the hill"
ASKED = {"model": "echo", "messages": [{"role": "user", "content": f"«{TEXT}»"}]}


def test_sigterm_lets_requests_end(start):
    server = start(ECHO, "--delay", 0.05)
    stream = server.client().chat.completions.create(**ASKED, stream=True)
    texts = []
    whole = threading.Thread(
        target=lambda: texts.append(server.client().chat.completions.create(**ASKED).choices[0].message.content)
    )
    whole.start()
    text = next(stream).choices[0].delta.content
    kept = http.client.HTTPConnection(server.host, server.port, timeout=20)  # open before, used after
    kept.request("GET", "/health")
    assert kept.getresponse().read() == b'{"status":"ok"}'
    time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(OSError):  # nobody listens any more, and idle connections are closed
        server.request("GET", "/health")
    with pytest.raises((OSError, http.client.HTTPException)):
        kept.request("POST", "/v1/chat/completions", json.dumps(ASKED), {"Content-Type": "application/json"})
        kept.getresponse()
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    whole.join()
    assert text == TEXT
    assert texts == [TEXT]
    assert server.process.wait(30) == 0
    assert len(server.log) == 1, server.log


def test_sigterm_ends_what_takes_too_long(start):
    server = start(ECHO, "--delay", 0.3, "--drain_timeout", 1)
    stream = server.client().chat.completions.create(**ASKED, stream=True)
    next(stream)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises((openai.APIError, Exception)):  # noqa: B017, PT011: cut off, in whatever way the client tells it
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == TEXT
    assert server.process.wait(30) == 0
    assert 0.9 < time.monotonic() - begun < 15


def test_sigterm_when_idle(start, folder):
    server = start(SERVE, folder, "--port", 0)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 10


def test_ctrl_c(start, folder):
    server = start(SERVE, folder, "--port", 0)
    assert server.stop(signal.SIGINT) == 130


def test_a_client_that_leaves_frees_its_blocks(start):
    server = start(ECHO, "--delay", 0.02)
    long = {"model": "echo", "prompt": "the cat", "max_tokens": 1500, "temperature": 0.0}
    stream = server.client().completions.create(**long, stream=True)
    next(iter(stream))
    assert server.metrics()["llmcore_cache_blocks_used"] > 0
    stream.close()
    server.idle(10)
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("POST", "/v1/completions", json.dumps(long), {"Content-Type": "application/json"})
    while not server.metrics()["llmcore_requests_running"]:
        time.sleep(0.02)
    connection.close()  # not streaming: the server has sent nothing yet
    metrics = server.idle(10)
    assert metrics['llmcore_requests_total{path="/v1/completions",status="499"}'] >= 1
