"""Bad requests: what is wrong, in OpenAI's form, and never a 5xx but the documented 503."""

from __future__ import annotations

import json
import socket

import pytest

from tests.serve.running import ECHO, SERVE

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}


def refused(server, status: int, value, path: str = "/v1/chat/completions", **headers) -> dict:
    got, body = server.post(path, value, **headers)
    assert got == status, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1; accepted: greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'; accepted: a valid number"),
        ({"temperature": None, "top_p": 0}, "top_p", "top_p is 0;"),
        ({"n": 10**30}, "n", "accepted: less than or equal to 128"),
        ({"n": 100}, "n", "n is 100; accepted: 1 to 64"),
        ({"n": 0}, "n", "n is 0;"),
        ({"n": 2.5}, "n", "n is 2.5;"),
        ({"n": True}, "n", "n is True;"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0;"),
        ({"max_tokens": 10**6}, "max_tokens", "together at most 2048"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "not both"),
        ({"stop": ["a"] * 65}, "stop", "up to 64 strings"),
        ({"stop": [""]}, "stop", "1 to 1024 characters"),
        ({"seed": 2**63}, "seed", "seed is"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids as keys, not 'x'"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "accepted: less than or equal to 100"),
        ({"logit_bias": {"99999": 1}}, None, "99999"),
        ({"logprobs": 3}, "logprobs", "logprobs is 3;"),
        ({"top_logprobs": 3}, None, "top_logprobs with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, None, "with stream true"),
        ({"stream": 1}, "stream", "stream is 1;"),
        ({"messages": []}, "messages", "messages is []"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'king'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0.type", "accepted: 'text'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "'a b'"),
        ({"tool_choice": "required"}, None, "tool_choice with tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"temprature": 1}, "temprature", "is no field"),
        ({"functions": []}, "functions", "is no field"),
        ({"guided_choice": []}, "guided_choice", "guided_choice is []"),
        ({"min_tokens": -1}, "min_tokens", "min_tokens is -1"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "is -1"),
        ({"stop_token_ids": [10**6]}, None, "1000000"),
        ({"model": 3}, "model", "model is 3"),
    ],
)  # fmt: skip
def test_wrong_fields(tiny, fields, param, told):
    error = refused(tiny, 400, CHAT | fields)
    assert told in error["message"]
    assert error["param"] == param or param is None
    assert error["type"] == "invalid_request_error"


def test_other_paths_too(tiny):
    complete = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    for fields, told in [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [1, 2, 10**6]}, "1000000"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": ["x"] * 65}, "65 choices; accepted: 1 to 64"),
        ({"prompt": ["x"] * 40, "n": 2}, "80 choices"),
        ({"best_of": 3}, "best_of is 3"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs is 21"),
    ]:
        assert told in refused(tiny, 400, complete | fields, "/v1/completions")["message"]
    for fields, told in [
        ({"input": []}, "input has 0 texts"),
        ({"input": ""}, "1 to 2048"),
        ({"input": [10**6]}, "1000000"),
        ({"input": ["x"] * 257}, "257 texts; accepted: 1 to 256"),
        ({"input": "the cat " * 3000}, "accepted: 1 to 2048"),
        ({"dimensions": 10**6}, "dimensions is 1000000; accepted: 1 to 64"),
        ({"encoding_format": "hex"}, "'hex'"),
    ]:
        assert told in refused(tiny, 400, {"model": "tiny", "input": "x"} | fields, "/v1/embeddings")["message"]
    assert refused(tiny, 404, CHAT | {"model": "nope"})["code"] == "model_not_found"
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/models/nope", 404),
                                 ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)):  # fmt: skip
        got, _, body = tiny.request(method, path)
        assert got == status
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe{}", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "n": ' + b"9" * 100_000 + b"}", b'{"temperature": NaN}', b'{"temperature": 1e999}',
        b'{"model": "tiny", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
        json.dumps(CHAT).encode("utf-16"),
    ],
)  # fmt: skip
def test_malformed_bodies(tiny, body):
    refused(tiny, 400, body)


def test_a_body_must_be_json_by_its_own_account(tiny):
    """A page of another site can send a form or plain text without asking, but not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        got, _, body = tiny.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), {"Content-Type": kind})
        assert got == 415, body
    status, headers, _ = tiny.request("OPTIONS", "/v1/chat/completions", None, {"Origin": "http://evil"})
    assert status == 405
    assert "access-control-allow-origin" not in headers


SCHEMAS = {
    "deep": json.loads('{"a":' * 70 + "1" + "}" * 70),
    "large": {"enum": [f"value {i}" for i in range(20_000)]},
    "ref": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "regex": {"type": "string", "pattern": "(((((a{1,100}){1,100}){1,100}){1,100}){1,100})"},
    "unknown": {"type": "thing"},
    "branches": {"allOf": [{"anyOf": [{"minLength": i + j} for i in range(12)]} for j in range(12)]},
    "counts": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
}


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_schema_bombs(tiny, name):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMAS[name]}}
    status, body = tiny.post("/v1/chat/completions", CHAT | {"response_format": form})
    assert status in (200, 400), body
    if name not in ("counts", "regex"):  # these are only walked as far as the text goes
        assert status == 400, body
        assert "response_format" in body["error"]["param"]
    assert tiny.post("/v1/chat/completions", CHAT)[0] == 200
    tiny.idle()


def test_regex_bombs(tiny):
    pytest.importorskip("llguidance")
    assert tiny.post("/v1/chat/completions", CHAT | {"guided_regex": SCHEMAS["regex"]["pattern"]})[0] in (200, 400)
    for pattern in ("(a", "(?=a)b", "\\1(a)", "a" * 70_000):
        assert "guided_regex" in refused(tiny, 400, CHAT | {"guided_regex": pattern})["message"]
    assert tiny.post("/v1/chat/completions", CHAT)[0] == 200


def test_large_bodies(start, folder):
    server = start(SERVE, folder, "--port", 0, "--name", "tiny", "--max-body", 1000)
    assert server.post("/v1/chat/completions", CHAT)[0] == 200
    large = CHAT | {"user": "x" * 2000}
    error = refused(server, 413, large)
    assert error["message"] == "the body is too large; accepted: 1000 bytes"
    assert refused(server, 413, CHAT | {"user": "x" * 3_000_000})["code"] == "body_too_large"
    # without a length, in chunks
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        for _ in range(20):
            connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(1000)
    assert server.post("/v1/chat/completions", CHAT)[0] == 200


def test_keys(start, folder):
    server = start(SERVE, folder, "--port", 0, "--name", "tiny", "--api-key", "sesame", LLMCORE_API_KEYS="one two")
    error = refused(server, 401, CHAT)
    assert error["type"] == "authentication_error"
    for wrong in ("Bearer", "Bearer no", "Basic sesame", "Bearer sesam", "Bearer sesame2", "sesame", "Bearer \xe9"):
        refused(server, 401, CHAT, Authorization=wrong.encode("latin-1"))
    for key in ("sesame", "one", "two"):
        assert server.post("/v1/chat/completions", CHAT, Authorization=f"Bearer {key}")[0] == 200
    assert server.request("GET", "/v1/models")[0] == 401
    for path in ("/health", "/metrics", "/"):
        assert server.request("GET", path)[0] == 200
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="no").models.list()
    assert server.client(api_key="sesame").models.list().data[0].id == "tiny"
    assert not any("sesame" in line for line in server.log)


def test_more_than_it_serves_at_a_time(start):
    server = start(ECHO, "--max_requests", 2, "--delay", 0.05)
    openai = pytest.importorskip("openai")
    asked = {"model": "echo", "messages": [{"role": "user", "content": "«the cat sat on the mat»"}]}
    streams = [server.client().chat.completions.create(**asked, stream=True) for _ in range(2)]
    status, headers, body = server.request(
        "POST", "/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )  # fmt: skip
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert json.loads(body)["error"]["code"] == "overloaded"
    # the official client waits and comes again
    assert server.client(max_retries=8).chat.completions.create(**asked).choices[0].message.content
    for stream in streams:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "the cat sat on the mat"
    with pytest.raises(openai.BadRequestError):
        server.client().chat.completions.create(**asked, n=1000)
    assert server.idle()['llmcore_requests_total{path="/v1/chat/completions",status="503"}'] >= 1


def test_time_is_up(start):
    server = start(ECHO, "--timeout", 0.6, "--delay", 0.1)
    openai = pytest.importorskip("openai")
    asked = {"model": "echo", "messages": [{"role": "user", "content": "«the cat sat on the mat and saw a rat»"}]}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client(max_retries=2).chat.completions.create(**asked)
    assert caught.value.status_code == 408
    pieces = []
    chunks = iter(server.client().chat.completions.create(**asked, stream=True))
    with pytest.raises(openai.APIError, match="not done within"):
        pieces.extend(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "".join(pieces)
    metrics = server.idle()
    assert metrics['llmcore_requests_total{path="/v1/chat/completions",status="408"}'] == 1  # and not three


def test_a_body_that_does_not_come(start):
    server = start(ECHO, "--body_timeout", 0.5)
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        assert b" 408 " in connection.recv(1000)
    server.idle()


def test_a_fault_of_the_engine_reaches_those_who_wait(start):
    server = start(ECHO, "--broken", 4)
    asked = {"model": "echo", "messages": [{"role": "user", "content": "«the cat sat on the mat and saw a rat»"}]}
    status, headers, body = server.request(
        "POST", "/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )  # fmt: skip
    assert status == 503
    assert "retry-after" in headers
    assert "a planted fault" in json.loads(body)["error"]["message"]
    server.idle()


def test_nothing_that_may_be_drawn(tiny):
    """logit_bias can't forbid everything, and penalties can't make a number of none: no 5xx."""
    bias = {str(i): -100 for i in range(340)}
    assert tiny.post("/v1/chat/completions", CHAT | {"logit_bias": bias, "temperature": 0.0})[0] == 200


def test_wrong_options(folder, capsys):
    from llmcore import cli

    for options, told in [
        (["--max-requests", "0"], "max_requests is 0"),
        (["--timeout", "-1"], "timeout is -1.0"),
        (["--api-key", "\xe9"], "no ASCII"),
        (["--cache-tokens", "8", "--max-sequences", "4096"], "max_sequences is 4096"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--host", "192.0.2.1"], "can't listen at 192.0.2.1"),
    ]:
        assert cli.main(["serve", str(folder), "--port", "0", *options]) == 2
        assert told in capsys.readouterr().err
