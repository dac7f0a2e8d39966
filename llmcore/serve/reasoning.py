"""Thoughts before the answer: `<think>` ... `</think>`, as Qwen3, DeepSeek-R1 and those trained after them write it."""

from __future__ import annotations

from collections.abc import Sequence

from llmcore.serve.incremental import Content, Parser, Reasoning, Source, Steps
from llmcore.tokenizers import Tokenizer

BEGIN, END = "<think>", "</think>"
_TAIL = 64  # tokens of the prompt in which its template may have begun or ended the thoughts


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the model marks its thoughts."""
    return tokenizer.token_to_id(BEGIN) is not None or BEGIN in (tokenizer.chat_template or "")


def begins_in_thoughts(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends within thoughts, as of templates that open them for the model."""
    tail = tokenizer.decode(prompt[-_TAIL:])
    return tail.rfind(BEGIN) > tail.rfind(END)


def reasoning_parser(inside: bool) -> Parser:
    """Splits text into `Reasoning` and `Content`. `inside`: it begins within thoughts.

    Thoughts can only come first: an answer that speaks of "<think>" stays as it is.
    """

    def steps(source: Source) -> Steps[None]:
        if not inside:
            start = source.at
            yield from source.skip_space()
            if not (yield from source.follows(BEGIN)):
                source.at = start
                yield from _rest(source)
                return
        yield from source.skip_space()
        yield from source.until(END, Reasoning)
        yield from source.skip_space()
        yield from _rest(source)

    return Parser(steps)


def _rest(source: Source) -> Steps[None]:
    while (yield from source.peek()):
        text = source.rest
        source.at = len(source.text)
        source.forget()
        yield Content(text)
