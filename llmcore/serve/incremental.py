"""Parsers of text that is still being written, as generators: straight-line code that yields what it has found, or None
where it needs more text."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

from llmcore.inference.text import overlap


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thoughts before it."""

    text: str


class CallStart(NamedTuple):
    """A tool is called: the how manyth call of the answer it is, and the function's name."""

    index: int
    name: str


class CallArguments(NamedTuple):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | Reasoning | CallStart | CallArguments
Result = TypeVar("Result")
Steps = Generator[Event | None, None, Result]


class Malformed(ValueError):
    """The text is not what its marker promised."""


class Source:
    """The text so far, and how much of it has been read."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False

    def add(self, text: str) -> None:
        self.text += text

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def forget(self) -> None:
        """Drops what has been read: nobody will go back to it."""
        self.text, self.at = self.text[self.at :], 0

    def peek(self) -> Steps[str]:
        """The next character; "" at the end of the text."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield None
        return self.text[self.at]

    def skip_space(self) -> Steps[str]:
        """The next character that is no space, not read yet; "" at the end."""
        while (c := (yield from self.peek())) and c.isspace():
            self.at += 1
        return c

    def follows(self, marker: str) -> Steps[bool]:
        """Whether the marker comes next; then it has been read."""
        while len(self.text) - self.at < len(marker):
            if self.ended or not marker.startswith(self.rest):
                return False
            yield None
        found = self.text.startswith(marker, self.at)
        self.at += len(marker) * found
        return found

    def until(self, marker: str, event: Callable[[str], Event] | None = None) -> Steps[str | None]:
        """Reads up to a marker and over it. What is before it is yielded by `event` as it comes, or else given back at
        once. None when the text ends without it; then all is read."""
        begin = self.at
        while (found := self.text.find(marker, self.at)) < 0:
            sure = len(self.text) - (0 if self.ended else overlap(self.rest, marker))
            if event is not None and sure > self.at:
                yield event(self.text[self.at : sure])
            self.at = sure if event is not None or self.ended else self.at
            if self.ended:
                return None
            yield None
        if event is not None and found > self.at:
            yield event(self.text[self.at : found])
        before, self.at = self.text[begin:found], found + len(marker)
        return before

    def json_value(self, event: Callable[[str], Event] | None = None) -> Steps[str]:
        """Reads one JSON value, whose text is yielded by `event` as it comes. Raises Malformed where there is none."""
        first = yield from self.skip_space()
        if not first or first in ",:]}":
            raise Malformed(f"{first!r} where a JSON value should be")
        begin, depth, in_string = self.at, 0, False
        while True:
            c = yield from self.peek()
            if not c:
                if depth or in_string:
                    raise Malformed("the text ends within a JSON value")
                break
            if not in_string and not depth and (c in ",]}" or c.isspace()):
                break  # behind a number or a word
            self.at += 1
            if event is not None:
                yield event(c)
            if in_string:
                if c == "\\":
                    escaped = yield from self.peek()
                    self.at += len(escaped)
                    if event is not None and escaped:
                        yield event(escaped)
                in_string = c != '"'
            elif c == '"':
                in_string = True
                continue
            else:
                depth += (c in "{[") - (c in "}]")
            if c in '"}]' and not depth and not in_string:
                break
        return self.text[begin : self.at]


class Parser:
    """Feeds a generator: text in, events out."""

    def __init__(self, steps: Callable[[Source], Steps[None]]) -> None:
        self._source = Source()
        self._steps = steps(self._source)

    def feed(self, text: str) -> list[Event]:
        """What this piece of text completes."""
        self._source.add(text)
        return self._run()

    def finish(self) -> list[Event]:
        """What was held back: the text has ended."""
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Event]:
        events: list[Event] = []
        for event in self._steps:
            if event is None:
                break
            last = events[-1] if events else None
            if type(last) is type(event) and not isinstance(event, CallStart) and last[:-1] == event[:-1]:
                events[-1] = event._replace(text=last.text + event.text)
            else:
                events.append(event)
        return events
