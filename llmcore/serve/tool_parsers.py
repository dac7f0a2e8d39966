"""Tool calls in what a model writes, in the forms of the common families, found while it is being written.

A parser turns text into `Content`, `CallStart` and `CallArguments` events. Text that begins like a call and is none is
content; where a call's name had been told already, its arguments end where they went wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from llmcore.serve.incremental import CallArguments, CallStart, Content, Malformed, Parser, Source, Steps
from llmcore.tokenizers import Tokenizer

_DEEPSEEK = {name: f"<｜tool▁{name.replace('_', '▁')}｜>" for name in
             ("calls_begin", "call_begin", "sep", "call_end", "calls_end")}  # fmt: skip


class _Calls:
    """The calls of one answer: gives each its number, and holds spaces around calls back."""

    def __init__(self, source: Source) -> None:
        self.source, self.count, self._space = source, 0, ""

    def text(self, text: str) -> Steps[None]:
        """Content, without the spaces at its end, which are dropped if a call follows."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            yield Content(kept)

    def text_until(self, marker: str) -> Steps[bool]:
        """Content up to a marker; whether it came."""
        steps = self.source.until(marker, Content)
        while True:
            try:
                event = next(steps)
            except StopIteration as end:
                return end.value is not None
            if event is None:
                yield None
            else:
                yield from self.text(event.text)

    def rest(self) -> Steps[None]:
        """All that follows is content."""
        while (yield from self.source.peek()):
            text, self.source.at = self.source.rest, len(self.source.text)
            self.source.forget()
            yield from self.text(text)
        yield from self.end()

    def end(self) -> Steps[None]:
        if self._space and not self.count:
            yield Content(self._space)

    def attempt(self, begin: int, reader: Callable[[], Steps[None]]) -> Steps[bool]:
        """A call by `reader`. Where it turns out to be none, what was read from `begin` on is content."""
        before = self.count
        try:
            yield from reader()
            self.source.forget()
            return True
        except Malformed:
            if self.count == before:
                yield from self.text(self.source.text[begin : self.source.at])
            self.source.forget()
            return False

    def start(self, name: str) -> CallStart:
        self._space = ""
        self.count += 1
        return CallStart(self.count - 1, name)

    def arguments(self, text: str) -> CallArguments:
        return CallArguments(self.count - 1, text)

    def read_named(self, name: str) -> Steps[None]:
        """The arguments of a call whose name has been read: a JSON object."""
        if not name or (yield from self.source.skip_space()) != "{":
            raise Malformed(f"no arguments of {name!r}")
        yield self.start(name)
        yield from self.source.json_value(self.arguments)

    def read_object(self) -> Steps[None]:
        """{"name": NAME, "arguments": OBJECT}, in any order; "parameters" means the same. Arguments that come before
        the name wait for it."""
        source, name, arguments = self.source, None, None
        if (yield from source.skip_space()) != "{":
            raise Malformed("no object")
        source.at += 1
        while (c := (yield from source.skip_space())) != "}":
            if c == ",":
                source.at += 1
                yield from source.skip_space()
            key = _loads((yield from source.json_value()))
            if (yield from source.skip_space()) != ":":
                raise Malformed("no colon")
            source.at += 1
            if key == "name" and name is None:
                name = _loads((yield from source.json_value()))
                if not isinstance(name, str) or not name:
                    raise Malformed("the name is no text")
                yield self.start(name)
                if arguments is not None:
                    yield self.arguments(arguments)
            elif key in ("arguments", "parameters") and arguments is None:
                is_object = (yield from source.skip_space()) == "{"
                told = name is not None and is_object
                text = yield from source.json_value(self.arguments if told else None)
                arguments = text if is_object else _text_of(text)
                if name is not None and not told:
                    yield self.arguments(arguments)
            else:
                yield from source.json_value()
        source.at += 1
        if name is None:
            raise Malformed("no name")
        if arguments is None:
            yield self.arguments("{}")


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def _text_of(value: str) -> str:
    """Arguments that are no object: a string is taken for the JSON text that it holds, null for none."""
    loaded = _loads(value)
    return loaded if isinstance(loaded, str) else "{}" if loaded is None else value


def _hermes(source: Source) -> Steps[None]:
    """Hermes 2 and Qwen 2.5, 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""
    calls = _Calls(source)
    while True:
        source.forget()
        if not (yield from calls.text_until("<tool_call>")):
            break
        if (yield from calls.attempt(source.at - len("<tool_call>"), calls.read_object)):
            yield from source.skip_space()
            yield from source.follows("</tool_call>")
    yield from calls.end()


def _llama3(source: Source) -> Steps[None]:
    """Llama 3: an answer that is {"name": ..., "parameters": {...}} and nothing else, or several of them behind each
    other or behind `;`, with or without <|python_tag|> before it."""
    calls = _Calls(source)
    while True:
        begin = source.at
        if (yield from source.skip_space()) in (";", ",") and calls.count:
            source.at += 1
            continue
        yield from source.follows("<|python_tag|>")
        if (yield from source.skip_space()) != "{":
            source.at = begin
            break
        if not (yield from calls.attempt(begin, calls.read_object)):
            break
    yield from calls.rest()


def _mistral(source: Source) -> Steps[None]:
    """Mistral: [TOOL_CALLS] before a list of {"name": ..., "arguments": {...}}, or, later, before each call as
    NAME{...} or NAME[ARGS]{...}."""
    calls = _Calls(source)
    while True:
        source.forget()
        if not (yield from calls.text_until("[TOOL_CALLS]")):
            break
        begin = source.at - len("[TOOL_CALLS]")
        if (yield from source.skip_space()) != "[":
            yield from calls.attempt(begin, lambda: _mistral_named(calls))
            continue
        source.at += 1
        while (yield from calls.attempt(begin, calls.read_object)):
            begin = source.at
            if (yield from source.skip_space()) != ",":
                source.at += source.text.startswith("]", source.at)
                break
            source.at += 1
    yield from calls.end()


def _mistral_named(calls: _Calls) -> Steps[None]:
    source, begin = calls.source, calls.source.at
    while (c := (yield from source.peek())) and (c.isalnum() or c in "_-."):
        source.at += 1
    name = source.text[begin : source.at]
    yield from source.follows("[ARGS]")
    yield from calls.read_named(name)


def _deepseek(source: Source) -> Steps[None]:
    """DeepSeek-V3 and -R1: special tokens around each call, which is function SEP NAME and the arguments as a block of
    JSON; from V3.1 on NAME SEP ARGUMENTS."""
    calls = _Calls(source)
    while True:
        source.forget()
        if not (yield from calls.text_until(_DEEPSEEK["calls_begin"])):
            break
        begin = source.at - len(_DEEPSEEK["calls_begin"])
        while True:
            yield from source.skip_space()
            if not (yield from source.follows(_DEEPSEEK["call_begin"])):
                break
            whole = yield from calls.attempt(begin, lambda: _deepseek_call(calls))
            begin = source.at
            if not whole:
                break
        yield from source.follows(_DEEPSEEK["calls_end"])
    yield from calls.end()


def _deepseek_call(calls: _Calls) -> Steps[None]:
    source = calls.source
    name = yield from source.until(_DEEPSEEK["sep"])
    if name is not None and name.strip() == "function":
        name = yield from source.until("\n")
        yield from source.skip_space()
        yield from source.follows("```json")
    if name is None:
        raise Malformed("the text ends before the name")
    yield from calls.read_named(name.strip())
    yield from source.skip_space()
    yield from source.follows("```")
    yield from source.skip_space()
    yield from source.follows(_DEEPSEEK["call_end"])


def _json(source: Source) -> Steps[None]:
    """The whole answer is one {"name": ..., "arguments": {...}}: what a constraint has made sure of."""
    calls = _Calls(source)
    yield from calls.attempt(source.at, calls.read_object)
    yield from calls.rest()


_STEPS = {"hermes": _hermes, "llama3": _llama3, "mistral": _mistral, "deepseek": _deepseek, "json": _json}
TOOL_PARSERS = ("hermes", "llama3", "mistral", "deepseek")
MARKERS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "deepseek": tuple(_DEEPSEEK.values()),
    "json": (),
}


def tool_parser(name: str) -> Parser:
    """A parser for one answer: one of `TOOL_PARSERS`, or "json"."""
    return Parser(_STEPS[name])


def guess_tool_parser(tokenizer: Tokenizer) -> str:
    """The form that a chat template shows its model. What shows none gets Hermes', the one of our own template."""
    template = tokenizer.chat_template or ""
    for name in ("deepseek", "mistral", "hermes", "llama3"):
        if MARKERS[name][0] in template:
            return name
    return "llama3" if '"parameters": dictionary' in template else "hermes"
