"""Tool calls in all formats, cut into pieces anywhere, and text that only looks like one."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.serve.incremental import CallArguments, CallStart, Content
from llmcore.serve.tool_parsers import TOOL_PARSERS, guess_tool_parser, tool_parser
from tests.serve.tiny import tiny_tokenizer

ARGUMENTS = [{"city": 'A "quoted" }] {[ \\ place', "n": [1, {"x": None}], "t": True}, {}, {"text": "é </tool_call> 你"}]
_DS = "<｜tool▁{}｜>".format
CB, B, S, E, CE = (_DS(name) for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))


def written(form: str, calls: list[tuple[str, str]]) -> str:
    """Calls as a model of the family writes them; arguments as JSON text."""
    if form == "hermes":
        parts = [f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls]
        return "\n".join(parts)
    if form == "llama3":
        return "<|python_tag|>" + "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)
    if form == "mistral":
        return "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"
    if form == "mistral-args":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in calls)
    if form == "mistral-plain":
        return "".join(f"[TOOL_CALLS]{n}{a}" for n, a in calls)
    if form == "deepseek":
        return CB + "\n".join(f"{B}function{S}{n}\n```json\n{a}\n```{E}" for n, a in calls) + CE
    if form == "deepseek-3.1":
        return CB + "".join(f"{B}{n}{S}{a}{E}" for n, a in calls) + CE
    raise ValueError(form)


FORMS = ["hermes", "llama3", "mistral", "mistral-args", "mistral-plain", "deepseek", "deepseek-3.1"]


def parsed(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls) of a text that comes in pieces."""
    parser = tool_parser(form.partition("-")[0])
    content, calls = "", []
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.finish():
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        else:
            assert isinstance(event, CallArguments)
            assert event.index == len(calls) - 1
            calls[-1][1] += event.text
    return content, [tuple(call) for call in calls]


def cut(text: str, places: list[int]) -> list[str]:
    places = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_calls_in_pieces(form, data):
    values = data.draw(st.lists(st.sampled_from(ARGUMENTS), min_size=1, max_size=3))
    calls = [(f"tool_{i}", json.dumps(value, ensure_ascii=data.draw(st.booleans()))) for i, value in enumerate(values)]
    before = data.draw(st.sampled_from(["", "Let me look < it [up] up.\n\n"])) if form != "llama3" else ""
    text = before + written(form, calls)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    content, found = parsed(form, cut(text, places))
    assert found == calls
    assert content == before.rstrip()


@pytest.mark.parametrize("form", TOOL_PARSERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_without_calls_stays_as_it_is(form, data):
    parts = ["<", "tool_call", ">", "{", '"name"', ": 1", "}", "[", "TOOL", "_CALLS]x", CB[:5], " ", "\n", "a", "é"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=20)))
    if "<tool_call>" in text or "[TOOL_CALLS]" in text:  # may become a call, or lose spaces around what looked like one
        return
    places = data.draw(st.lists(st.integers(0, 100), max_size=8))
    content, calls = parsed(form, cut(text, places))
    assert calls == []
    assert content == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='<>{}[]"\\:,; abnme\n', max_size=60), form=st.sampled_from(TOOL_PARSERS))
def test_nothing_makes_a_parser_fail(text, form):
    marks = {"hermes": "<tool_call>", "llama3": "", "mistral": "[TOOL_CALLS]", "deepseek": CB + B}
    whole = parsed(form, [marks[form] + text])
    assert parsed(form, list(marks[form] + text)) == whole


def test_what_is_no_call_is_content():
    for form, text in [
        ("hermes", "<tool_call>not json</tool_call> and on"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("llama3", '{"answer": 42}'),
        ("llama3", "[1, 2]"),
        ("mistral", "[TOOL_CALLS] none"),
        ("deepseek", CB + "nothing"),
    ]:
        content, calls = parsed(form, [text])
        assert calls == []
        if form != "deepseek":
            assert content.startswith(text.partition(" none")[0])


def test_a_call_that_is_cut_off_keeps_what_it_has():
    assert parsed("hermes", ['<tool_call>{"name": "f", "arguments": {"a": "b']) == ("", [("f", '{"a": "b')])
    assert parsed("mistral-args", ["[TOOL_CALLS]f[ARGS]{"]) == ("", [("f", "{")])


def test_arguments_stream_while_they_are_written():
    parser = tool_parser("hermes")
    assert parser.feed('<tool_call>{"name": "f", "argu') == [CallStart(0, "f")]
    assert parser.feed('ments": {"a": 1') == [CallArguments(0, '{"a": 1')]
    assert parser.feed("2}}</tool") == [CallArguments(0, "2}")]
    assert parser.feed("_call>\n") == []
    assert parser.finish() == []


def test_variants_of_the_object():
    def call(text):
        return parsed("hermes", [f"<tool_call>{text}</tool_call>"])[1]

    assert call('{"arguments": {"a": 1}, "name": "f"}') == [("f", '{"a": 1}')]
    assert call('{"name": "f"}') == [("f", "{}")]
    assert call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == [("f", '{"a": 1}')]
    assert call('{"name": "f", "arguments": null, "id": 3}') == [("f", "{}")]
    assert call('{"name": "f", "name": "g", "arguments": {}, "arguments": {"x": 1}}') == [("f", "{}")]


@pytest.mark.parametrize("form", TOOL_PARSERS)
def test_the_template_says_which(form):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {
        "hermes": "{{ '<tool_call>' }}", "mistral": "{{ '[TOOL_CALLS]' }}", "deepseek": f"{{{{ '{CB}' }}}}",
        "llama3": "<|python_tag|>",
    }[form]  # fmt: skip
    assert guess_tool_parser(tokenizer) == form


def test_without_a_template_it_is_ours():
    assert guess_tool_parser(tiny_tokenizer()) == "hermes"
