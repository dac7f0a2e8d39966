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


def ask(connection: http.client.HTTPConnection) -> None:
    connection.request("POST", "/v1/chat/completions", json.dumps(ASKED), {"Content-Type": "application/json"})
    connection.getresponse()


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
        ask(kept)
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    whole.join()
    assert text == TEXT
    assert texts == [TEXT]
    assert server.process.wait(300) == 0
    assert len(server.log) == 1, server.log


def test_sigterm_ends_what_takes_too_long(start):
    server = start(ECHO, "--delay", 0.3, "--drain_timeout", 1)
    stream = server.client().chat.completions.create(**ASKED, stream=True)
    next(stream)
    statuses = []
    whole = threading.Thread(target=lambda: statuses.append(server.post("/v1/chat/completions", ASKED)[0]))
    whole.start()
    while server.metrics()["llmcore_requests_in_flight"] < 2:
        time.sleep(0.02)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    whole.join()
    assert statuses == [503]
    assert server.process.wait(300) == 0
    assert time.monotonic() - begun > 0.9


def test_sigterm_when_idle(start, folder):
    server = start(SERVE, folder, "--port", 0)
    assert server.stop() == 0


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
    server.idle()
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("POST", "/v1/completions", json.dumps(long), {"Content-Type": "application/json"})
    while not server.metrics()["llmcore_requests_running"]:
        time.sleep(0.02)
    connection.close()  # not streaming: the server has sent nothing yet
    metrics = server.idle()
    assert metrics['llmcore_requests_total{path="/v1/completions",status="499"}'] >= 1
