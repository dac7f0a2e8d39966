"""64 clients at once, some of which leave, lie or attack: no 5xx but 503 with Retry-After, no block lost, and memory
that does not grow. Seconds here; LLMCORE_LOAD_SECONDS=600 for the long run."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter

import pytest

from tests.serve.running import SERVE

CLIENTS = 64
SECONDS = float(os.environ.get("LLMCORE_LOAD_SECONDS", "12"))
GROWTH = 64 << 20  # bytes that a process may gain after its warm-up: arenas of the allocator, not leaks

WORDS = [
    "the",
    "quick",
    "fox",
    "and",
    "a",
    "lazy",
    "dog",
    "run",
    "over",
    "hill",
    "cat",
    "sat",
    "on",
    "mat",
    "é",
    "你好",
]


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def chat(rng: random.Random) -> dict:
    return {
        "model": "tiny", "messages": [{"role": "user", "content": text(rng, 40)}], "max_tokens": rng.randint(1, 24),
        "temperature": rng.choice([0, 1.0]), "stream": rng.random() < 0.5, "n": rng.choice([1, 1, 1, 3]),
    }  # fmt: skip


def fair(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.randrange(4)
    if kind == 0:
        value = {"model": "tiny", "prompt": [text(rng, 30)] * rng.randint(1, 3), "max_tokens": rng.randint(1, 16)}
        return "/v1/completions", json.dumps(value | {"stream": rng.random() < 0.5}).encode()
    if kind == 1:
        return "/v1/embeddings", json.dumps({"model": "tiny", "input": [text(rng, 30), text(rng, 9)]}).encode()
    value = chat(rng)
    if kind == 2:
        value |= rng.choice(
            [{"stop": ["a"]}, {"logprobs": True, "top_logprobs": 2}, {"frequency_penalty": 1.0},
             {"response_format": {"type": "json_object"}}, {"guided_choice": ["cat", "dog"]},
             {"logit_bias": {"5": -100}}]
        )  # fmt: skip
    return "/v1/chat/completions", json.dumps(value).encode()


def unfair(rng: random.Random) -> tuple[str, bytes]:
    """What must be refused."""
    value = chat(rng)
    body = rng.choice([
        lambda: b"\xff\xfe" + json.dumps(value).encode(),
        lambda: json.dumps(value).encode()[: rng.randint(0, 60)],
        lambda: json.dumps(value | {"n": 10**9}).encode(),
        lambda: json.dumps(value | {"max_tokens": 10**9}).encode(),
        lambda: json.dumps(value | {"n": -1}).encode(),
        lambda: json.dumps(value | {"temperature": "x"}).encode(),
        lambda: json.dumps(value | {"messages": "x" * 1000}).encode(),
        lambda: json.dumps(value | {"user": "x" * 300_000}).encode(),
        lambda: b'{"a":' * 20_000,
        lambda: b'{"model": "\xc3\x28"}',
        lambda: json.dumps(value | {"stop": ["x"] * 1000}).encode(),
        lambda: json.dumps(value | {"logit_bias": {str(i): 1 for i in range(5000)}}).encode(),
        lambda: json.dumps(value | {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"allOf": [{"enum": [str(i) * 9 for i in range(9000)]}]}}}}).encode(),
        lambda: json.dumps(value | {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": json.loads('{"not":' * 80 + "{}" + "}" * 80)}}}).encode(),
        lambda: json.dumps(value | {"guided_regex": "(" * 500}).encode(),
    ])()  # fmt: skip
    return rng.choice(["/v1/chat/completions", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"]), body


class Client(threading.Thread):
    """Sends requests, most of them fair, until the time is up."""

    def __init__(self, server, seed: int, end: float) -> None:
        super().__init__()
        self.server, self.rng, self.end = server, random.Random(seed), end
        self.statuses: Counter = Counter()
        self.problems: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.end and len(self.problems) < 5:
            try:
                self.one()
            except Exception as error:
                self.problems.append(repr(error))

    def one(self) -> None:
        dice = self.rng.random()
        if dice < 0.05:
            return self.garbage()
        path, body = unfair(self.rng) if dice < 0.3 else fair(self.rng)
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=120)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            if dice > 0.85:  # leaves before, or within, the answer
                time.sleep(self.rng.random() * 0.2)
                if self.rng.random() < 0.5:
                    connection.sock.recv(self.rng.randint(1, 300))
                self.statuses["left"] += 1
                return
            response = connection.getresponse()
            data = response.read()
            self.statuses[response.status] += 1
            self.check(response, data, dice < 0.3, body)
        finally:
            connection.close()

    def check(self, response, data: bytes, must_fail: bool, body: bytes) -> None:
        if response.status == 503:
            if not response.getheader("Retry-After"):
                self.problems.append("503 without Retry-After")
        elif not (400 <= response.status < 500 if must_fail else response.status == 200):
            self.problems.append(f"{response.status} {data[:200]!r} for {body[:200]!r}")
        elif response.status == 200 and response.getheader("Content-Type").startswith("text/event-stream"):
            events = data.decode().removesuffix("\n\n").split("\n\n")
            if events[-1] != "data: [DONE]" or any('"error"' in event for event in events):
                self.problems.append(f"a stream ends with {events[-2:]}")
        else:
            json.loads(data)

    def garbage(self) -> None:
        """No HTTP at all, or a request that stops half-way."""
        with socket.create_connection((self.server.host, self.server.port), timeout=30) as connection:
            post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            garbage = [
                b"\x16\x03\x01" + self.rng.randbytes(100) + b"\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: " + b"x" * 70_000,
                post + b"99\r\n\r\n{",
                post + b"-5\r\n\r\n",
                b"",
            ]
            connection.sendall(self.rng.choice(garbage))
            self.statuses["garbage"] += 1


def load(server, seconds: float, seed: int) -> Counter:
    clients = [Client(server, seed + i, time.monotonic() + seconds) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    problems = [problem for client in clients for problem in client.problems]
    assert not problems, problems[:5]
    return sum((client.statuses for client in clients), Counter())


def test_load(start, folder):
    pytest.importorskip("llguidance")
    server = start(
        SERVE, folder, "--port", 0, "--name", "tiny", "--max-requests", 48, "--max-body", 200_000,
        "--cache-tokens", 768, "--max-sequences", 32, "--max-batch-tokens", 256,
    )  # fmt: skip
    load(server, min(SECONDS / 3, 30), 1000)  # the warm-up
    server.idle()
    before = server.resident()
    statuses = load(server, SECONDS, 0)
    metrics = server.idle()
    grown = server.resident() - before
    print(f"\n{dict(statuses)}; {metrics['llmcore_preemptions_total']:.0f} preemptions; grown by {grown >> 10} KiB")
    assert server.process.poll() is None
    assert not [line for line in server.log if "Traceback" in line], "".join(server.log)[-3000:]
    for wanted in (200, 400, 413, 503, "left", "garbage"):
        assert statuses[wanted], statuses
    assert grown < GROWTH, f"{grown >> 20} MiB more than after the warm-up"
    assert not [s for s in metrics if s.startswith("llmcore_requests_total") and 'status="5' in s and '"503"' not in s]
    assert server.stop() == 0
