"""The official client against server processes: the tiny model by `llmcore serve`, and a model that says what it is
told."""

from __future__ import annotations

import json

import pytest
import torch

from llmcore.inference import load
from llmcore.serve.tool_parsers import MARKERS
from tests.serve.running import ECHO, SERVE

openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "the cat"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks it up.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": f"«{text}»"}]


# ---- chats


def test_a_chat_is_what_the_model_says(tiny, lm):
    client = tiny.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llmcore"
    (wanted,) = lm.complete([USER], max_tokens=12)
    got = client.chat.completions.create(model="tiny", messages=USER, max_tokens=12)
    assert got.object == "chat.completion"
    assert got.choices[0].message.content == wanted.text
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert got.usage.prompt_tokens == wanted.num_prompt_tokens
    assert got.usage.completion_tokens == len(wanted.tokens)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_streams(tiny):
    client = tiny.client()
    asked = {"model": "tiny", "messages": USER, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len(chunks) > 6
    assert all(c.usage is None for c in client.chat.completions.create(**asked, stream=True))


def test_seeds_and_n(tiny):
    client = tiny.client()
    asked = {"model": "tiny", "messages": USER, "max_tokens": 10, "temperature": 1.0}
    several = client.chat.completions.create(**asked, seed=7, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert several.usage.completion_tokens == 30
    for offset in range(3):
        one = client.chat.completions.create(**asked, seed=7 + offset)
        assert one.choices[0].message.content == texts[offset]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs(tiny, lm):
    client = tiny.client()
    got = client.chat.completions.create(model="tiny", messages=USER, max_tokens=6, logprobs=True, top_logprobs=3)
    (wanted,) = lm.complete([USER], max_tokens=6)
    content = got.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx(wanted.logprobs, abs=1e-4)
    known = [token for token in wanted.tokens if lm.tokenizer.id_to_token(token) is not None]
    assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == lm.tokenizer.decode(known)
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # it is greedy
    streamed = [
        one
        for chunk in client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
        )
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in content]


def test_settings_reach_the_model(tiny, lm):
    client = tiny.client()

    def text(**settings):
        extra = {k: settings.pop(k) for k in list(settings) if k in ("top_k", "min_p", "repetition_penalty")}
        got = client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=10, extra_body=extra or None, **settings
        )  # fmt: skip
        return got.choices[0].message.content

    for settings in (
        {"temperature": 1.3, "seed": 5, "top_k": 4},
        {"temperature": 1.3, "seed": 5, "top_p": 0.5},
        {"temperature": 1.3, "seed": 5, "min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
    ):
        assert text(**settings) == lm.complete([USER], max_tokens=10, **settings)[0].text, settings
    plain = text()
    first = lm.complete([USER], max_tokens=1)[0].tokens[0]
    assert text(logit_bias={str(first): -100}) != plain
    only = lm.tokenizer.encode("fox")[0]
    assert set(text(logit_bias={str(only): 100})) == set(lm.tokenizer.decode([only]))


def test_stop(echo):
    client = echo.client()
    got = client.chat.completions.create(model="echo", messages=say("the cat sat on the mat"), stop=["on", "zzz"])
    assert got.choices[0].message.content == "the cat sat "
    assert got.choices[0].finish_reason == "stop"
    got = client.chat.completions.create(model="echo", messages=say("the cat sat"), max_completion_tokens=2)
    assert got.choices[0].finish_reason == "length"
    assert got.usage.completion_tokens == 2
    unicode = client.chat.completions.create(model="echo", messages=say("é 你好 🤗 done"), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in unicode]
    assert "".join(pieces) == "é 你好 🤗 done"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_that_was_seen_is_not_run_again(tiny):
    client = tiny.client()
    messages = [{"role": "user", "content": "the quick fox and the lazy dog run over the hill " * 4}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 17 <= cached < first.usage.prompt_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


def test_messages_of_all_kinds(echo):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "time", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
        {"role": "user", "content": "«good»"},
    ]  # fmt: skip
    got = echo.client().chat.completions.create(model="echo", messages=messages, tools=TOOLS)
    assert got.choices[0].message.content == "good"
    again = [*messages, got.choices[0].message, {"role": "user", "content": "«better»"}]  # as agents do
    assert echo.client().chat.completions.create(model="echo", messages=again).choices[0].message.content == "better"


# ---- tools


CALLS = (
    "Let me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "Oslo"}}\n</tool_call>'
)


def test_tools(echo):
    got = echo.client().chat.completions.create(model="echo", messages=say(CALLS), tools=TOOLS)
    message = got.choices[0].message
    assert got.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me see."
    assert [call.function.name for call in message.tool_calls] == ["weather", "time"]
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert len({call.id for call in message.tool_calls}) == 2


def test_tools_stream(echo):
    calls, content, finish = {}, "", None
    pieces = 0
    for chunk in echo.client().chat.completions.create(model="echo", messages=say(CALLS), tools=TOOLS, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
        for call in delta.tool_calls or ():
            pieces += 1
            one = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
            assert call.id is None or call.id == one["id"]
            one["arguments"] += call.function.arguments or ""
    assert content == "Let me see."
    assert finish == "tool_calls"
    assert [calls[i]["name"] for i in (0, 1)] == ["weather", "time"]
    assert [json.loads(calls[i]["arguments"]) for i in (0, 1)] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert pieces > 6  # arguments came while they were written


def test_tools_may_be_left_alone(echo):
    client = echo.client()
    create = client.chat.completions.create
    assert create(model="echo", messages=say(CALLS)).choices[0].message.content == CALLS
    got = create(model="echo", messages=say(CALLS), tools=TOOLS, tool_choice="none")
    assert got.choices[0].message.content == CALLS
    assert got.choices[0].finish_reason == "stop"
    one = create(model="echo", messages=say(CALLS), tools=TOOLS, parallel_tool_calls=False)
    assert [call.function.name for call in one.choices[0].message.tool_calls] == ["weather"]


def test_the_client_parses_them(echo):
    """Through the client's own helper for streams, which checks the form of every event."""
    with echo.client().chat.completions.stream(model="echo", messages=say(CALLS), tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert [call.function.name for call in final.choices[0].message.tool_calls] == ["weather", "time"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("parser", "marks", "text"),
    [
        ("llama3", ["<|python_tag|>"], '<|python_tag|>{"name": "time", "parameters": {"city": "Rome"}}'),
        ("mistral", ["[TOOL_CALLS]"], '[TOOL_CALLS][{"name": "time", "arguments": {"city": "Rome"}}]'),
        (
            "deepseek",
            MARKERS["deepseek"],
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n"
            '{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
    ],
)
def test_other_forms(start, parser, marks, text, special):
    """Marks that are special tokens, which text has none of, and marks that are text."""
    options = [x for mark in marks for x in ("--special", mark)] if special else []
    server = start(ECHO, "--tool_parser", parser, *options)
    got = server.client().chat.completions.create(model="echo", messages=say(text), tools=TOOLS)
    (call,) = got.choices[0].message.tool_calls
    assert call.function.name == "time"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert not got.choices[0].message.content


# ---- thoughts


def test_reasoning(start):
    server = start(ECHO, "--special", "<think>", "--special", "</think>")
    text = "<think>\nhm hm\n</think>\n\nthe <b>cat</b>"
    got = server.client().chat.completions.create(model="echo", messages=say(text))
    assert got.choices[0].message.content == "the <b>cat</b>"
    assert got.choices[0].message.reasoning_content == "hm hm"
    content = thoughts = ""
    for chunk in server.client().chat.completions.create(model="echo", messages=say(text), stream=True):
        content += chunk.choices[0].delta.content or ""
        thoughts += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    assert content == "the <b>cat</b>"
    assert thoughts.strip() == "hm hm"
    got = server.client().chat.completions.create(model="echo", messages=say(f"<think>hm</think>{CALLS}"), tools=TOOLS)
    assert got.choices[0].message.reasoning_content == "hm"
    assert len(got.choices[0].message.tool_calls) == 2


# ---- structured output


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def structured(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_json_schema(tiny):
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    client = tiny.client()
    for seed in range(4):
        got = client.chat.completions.create(
            model="tiny", messages=USER, response_format=structured(SCHEMA), temperature=1.0, seed=seed, n=2,
            max_tokens=200,
        )  # fmt: skip
        for choice in got.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_choice_and_regex(tiny):
    pytest.importorskip("llguidance")
    client = tiny.client()

    def text(**extra):
        got = client.chat.completions.create(
            model="tiny", messages=USER, temperature=1.0, seed=3, max_tokens=60, extra_body=extra
        )  # fmt: skip
        return got.choices[0].message.content

    assert text(guided_choice=["yes", "no"]) in ("yes", "no")
    digits = text(guided_regex="[0-9]{4}-[0-9]{2}")
    assert digits.replace("-", "").isdecimal()
    assert len(digits) == 7
    got = client.completions.create(
        model="tiny", prompt="x", max_tokens=9, extra_body={"guided_choice": ["a cat", "a dog"]}
    )  # fmt: skip
    assert got.choices[0].text in ("a cat", "a dog")


def test_a_tool_that_must_be_called(tiny):
    pytest.importorskip("llguidance")
    text = json.dumps(TOOLS).replace('"string"', '"string", "maxLength": 6')
    limited = json.loads(text.replace('"required"', '"additionalProperties": false, "required"'))
    for choice in ("required", {"type": "function", "function": {"name": "time"}}):
        got = tiny.client().chat.completions.create(
            model="tiny", messages=USER, tools=limited, tool_choice=choice, temperature=1.0, seed=1, max_tokens=150
        )  # fmt: skip
        (call,) = got.choices[0].message.tool_calls
        assert call.function.name in (("weather", "time") if choice == "required" else ("time",))
        assert isinstance(json.loads(call.function.arguments)["city"], str)
        assert got.choices[0].finish_reason == "tool_calls"
        assert got.choices[0].message.content is None


# ---- texts


def test_completions(tiny, lm):
    client = tiny.client()
    prompts = ["the cat", "a rat"]
    wanted = [one.text for one in lm.complete(prompts, max_tokens=9)]
    got = client.completions.create(model="tiny", prompt=prompts, max_tokens=9)
    assert [choice.text for choice in got.choices] == wanted
    ids = [lm.encode(prompt) for prompt in prompts]
    assert [c.text for c in client.completions.create(model="tiny", prompt=ids, max_tokens=9).choices] == wanted
    assert client.completions.create(model="tiny", prompt=ids[0], max_tokens=9).choices[0].text == wanted[0]
    streamed = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=9, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == wanted
    assert client.completions.create(model="tiny", prompt="the").usage.completion_tokens == 16
    several = client.completions.create(model="tiny", prompt=prompts, n=2, temperature=1.0, seed=1, max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_completions_echo_and_logprobs(tiny, lm):
    got = tiny.client().completions.create(model="tiny", prompt="the cat", max_tokens=3, echo=True, logprobs=2)
    choice, ids = got.choices[0], lm.encode("the cat")
    assert choice.text.startswith("the cat")
    tokens = torch.tensor([ids + lm.complete(["the cat"], max_tokens=3)[0].tokens])
    with torch.inference_mode():
        logprobs = lm.model.logits(lm.model(tokens).hidden)[0].float().log_softmax(-1)
    wanted = logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(ids) + 3
    assert "".join(choice.logprobs.tokens[: len(ids)]) == "the cat"
    for offset, token in list(zip(choice.logprobs.text_offset, choice.logprobs.tokens))[: len(ids)]:
        assert choice.text[offset : offset + len(token)] == token
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])


# ---- embeddings


def test_embeddings(tiny, lm):
    client = tiny.client()
    texts = ["the cat sat", "a rat", "the cat sat"]
    got = client.embeddings.create(model="tiny", input=texts)
    vectors = torch.tensor([one.embedding for one in got.data])
    assert [one.index for one in got.data] == [0, 1, 2]
    for text, vector in zip(texts, vectors):
        ids = torch.tensor([lm.tokenizer.encode(text)])
        with torch.inference_mode():
            hidden = lm.model(ids).hidden[0].float().mean(0)
        torch.testing.assert_close(vector, hidden / hidden.norm(), rtol=1e-4, atol=1e-5)
    assert got.usage.prompt_tokens == sum(len(lm.tokenizer.encode(text)) for text in texts)
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert torch.equal(torch.tensor([one.embedding for one in plain.data]), vectors)
    short = client.embeddings.create(model="tiny", input=lm.tokenizer.encode("a rat"), dimensions=8)
    assert len(short.data[0].embedding) == 8
    assert torch.tensor(short.data[0].embedding).norm() == pytest.approx(1, abs=1e-5)


def test_last_token_pooling(start, folder, lm):
    server = start(SERVE, folder, "--port", "0", "--pooling", "last")
    got = server.client().embeddings.create(model=str(folder), input="a rat")
    ids = torch.tensor([[*lm.tokenizer.encode("a rat"), lm.tokenizer.eos_id]])
    with torch.inference_mode():
        hidden = lm.model(ids).hidden[0, -1].float()
    torch.testing.assert_close(torch.tensor(got.data[0].embedding), hidden / hidden.norm(), rtol=1e-4, atol=1e-5)
