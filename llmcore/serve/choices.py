"""What an engine's deltas say to a client: text, thoughts, tool calls, log-probabilities."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llmcore.inference.sequence import Delta, Finish, TokenLogprob
from llmcore.inference.text import TextStream
from llmcore.serve.incremental import CallArguments, CallStart, Content, Event, Parser, Reasoning
from llmcore.tokenizers import Tokenizer
from llmcore.tokenizers.train import byte_alphabet

_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}
_REPLACEMENT = "\ufffd"


class Choice:
    """One answer while it is being written.

    Args:
        reasoning, tools: parsers that tell thoughts and calls from the text; None: all is text.
        one_call: calls after the first are dropped.
        stream: makes text of tokens where the engine's own lacks special tokens that a parser must see.
    """

    def __init__(
        self,
        reasoning: Parser | None = None,
        tools: Parser | None = None,
        *,
        one_call: bool = False,
        stream: TextStream | None = None,
    ) -> None:
        self._reasoning, self._tools, self._one_call, self._stream = reasoning, tools, one_call, stream
        self.content, self.thoughts = [], []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: str | None = None

    def take(self, delta: Delta) -> list[Event]:
        """What a delta tells; the sum of all is kept."""
        last = delta.finish is not None
        text = delta.text if self._stream is None else self._streamed(delta)
        events = [Content(text)] if text else []
        for parser, kind in ((self._reasoning, Content), (self._tools, Content)):
            if parser is not None:
                events = _through(parser, kind, events, last)
        events = [event for event in events if self._keep(event)]
        self.logprobs += delta.logprobs or []
        if last:
            called = bool(self.calls) and delta.finish is Finish.STOP
            self.finish = "tool_calls" if called else "length" if delta.finish is Finish.LENGTH else "stop"
        return events

    def _streamed(self, delta: Delta) -> str:
        # a stop string ends a text with the token that completes it, unless it came too early (`min_tokens`)
        ends = len(delta.tokens) if delta.finish is Finish.STOP else 0
        text = "".join(self._stream.feed(token, count == ends) for count, token in enumerate(delta.tokens, 1))
        return text + self._stream.finish() if delta.finish is not None else text

    def _keep(self, event: Event) -> bool:
        if isinstance(event, Content):
            self.content.append(event.text)
        elif isinstance(event, Reasoning):
            self.thoughts.append(event.text)
        elif self._one_call and event.index > 0:
            return False
        elif isinstance(event, CallStart):
            self.calls.append(
                {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                 "function": {"name": event.name, "arguments": ""}}
            )  # fmt: skip
        else:
            self.calls[event.index]["function"]["arguments"] += event.text
        return True


def _through(parser: Parser, kind: type, events: Iterable[Event], last: bool) -> list[Event]:
    passed: list[Event] = []
    for event in events:
        passed += parser.feed(event.text) if isinstance(event, kind) else [event]
    return passed + parser.finish() if last else passed


def chat_delta(event: Event, choice: Choice) -> dict[str, Any]:
    """An event as the delta of a chat's chunk."""
    if isinstance(event, Content):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, CallArguments):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    call = choice.calls[event.index]
    return {
        "tool_calls": [
            {"index": event.index, "id": call["id"], "type": "function",
             "function": {"name": event.name, "arguments": ""}}
        ]
    }  # fmt: skip


def special_marks(tokenizer: Tokenizer, marks: Iterable[str]) -> frozenset[int]:
    """Those of a parser's marks that are special tokens, and so no part of the engine's text."""
    return frozenset(tokenizer.special_tokens[mark] for mark in marks if mark in tokenizer.special_tokens)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes of a token; None for a row of the model that no token has."""
    stored = tokenizer.id_to_token(token)
    if stored is None:
        return None
    text = tokenizer.decode([token])
    if _REPLACEMENT not in text:
        return text.encode()
    if len(stored) == 6 and stored.startswith("<0x"):
        return bytes.fromhex(stored[3:5])
    if all(character in _BYTE_OF for character in stored):
        return bytes(_BYTE_OF[character] for character in stored)
    return text.encode()


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
    """Log-probabilities in the form of chats."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token) or b""
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    return {
        "content": [
            entry(one.token, one.logprob)
            | {"top_logprobs": [entry(token, value) for token, value in list(one.top.items())[:top]]}
            for one in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], tokens: Sequence[int], offset: int
) -> dict[str, Any]:
    """Log-probabilities in the form of completions; None stands for a prompt's first token. `offset`: characters
    before the first of these tokens."""
    names = [_token_name(tokenizer, token) for token in tokens]
    offsets = []
    for name, token in zip(names, tokens):
        offsets.append(offset)
        offset += len(name) if _is_text(tokenizer, token) else 0
    return {
        "tokens": names,
        "token_logprobs": [None if one is None else _finite(one.logprob) for one in logprobs],
        "top_logprobs": [
            None if one is None else {_token_name(tokenizer, t): _finite(v) for t, v in one.top.items()}
            for one in logprobs
        ],
        "text_offset": offsets,
    }


def _is_text(tokenizer: Tokenizer, token: int) -> bool:
    return _REPLACEMENT not in (token_bytes(tokenizer, token) or b"\xff").decode(errors="replace")


def _token_name(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; for a part of a character its bytes, as OpenAI writes them."""
    data = token_bytes(tokenizer, token)
    if data is None:
        return f"token:{token}"
    return data.decode() if _is_text(tokenizer, token) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity: what a bias or a constraint left as the only choice may have been impossible."""
    return max(logprob, -9999.0)
