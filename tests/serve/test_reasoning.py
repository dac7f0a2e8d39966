from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.inference.sequence import Delta, Finish
from llmcore.inference.text import TextStream
from llmcore.serve.choices import Choice, special_marks, token_bytes
from llmcore.serve.incremental import Content, Reasoning
from llmcore.serve.reasoning import begins_in_thoughts, reasoning_parser, thinks
from tests.serve.tiny import SPECIAL, TEXT, tiny_tokenizer


def split(text: str, inside: bool, places: list[int] = []) -> tuple[str, str]:  # noqa: B006
    parser, thoughts, content = reasoning_parser(inside), "", ""
    cuts = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.finish():
        if isinstance(event, Reasoning):
            thoughts += event.text
        else:
            assert isinstance(event, Content)
            content += event.text
    return thoughts, content


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nhm < so\n</think>\n\nThe answer", False, ("hm < so\n", "The answer")),
        ("\n <think>a</think>b", False, ("a", "b")),
        ("hm</think>b", True, ("hm", "b")),
        ("no thoughts <think>x</think>", False, ("", "no thoughts <think>x</think>")),
        ("a</think>b", False, ("", "a</think>b")),
        ("never ends", True, ("never ends", "")),
        ("<think></think>\n\nb", False, ("", "b")),
        ("  text", False, ("", "  text")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
    ],
)
def test_split(text, inside, expected):
    assert split(text, inside) == expected
    assert split(text, inside, list(range(len(text)))) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="<>/think a\n", max_size=40), inside=st.booleans(), places=st.lists(st.integers(0, 40)))
def test_pieces_do_not_matter(text, inside, places):
    assert split(text, inside, places) == split(text, inside)


def test_templates_that_open_the_thoughts():
    tokenizer = tiny_tokenizer((*SPECIAL, "<think>", "</think>"))
    assert thinks(tokenizer)
    assert not thinks(tiny_tokenizer())

    def inside(text):
        return begins_in_thoughts(tokenizer, tokenizer.encode(text, allow_special=True))

    assert inside("<|im_start|>assistant\n<think>\n")
    assert not inside("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not inside("<|im_start|>assistant\n")


def test_marks_that_are_special_tokens_are_seen():
    """The engine's own text has no special tokens; a parser's marks may be some."""
    tokenizer = tiny_tokenizer((*SPECIAL, "[TOOL_CALLS]"))
    marks = special_marks(tokenizer, ("[TOOL_CALLS]", "[ARGS]"))
    assert marks == {tokenizer.special_tokens["[TOOL_CALLS]"]}
    said = "the fox é 你 [TOOL_CALLS]f{}"
    ids = tokenizer.encode(said + "<|im_end|>", allow_special=True)
    choice = Choice(stream=TextStream(tokenizer, shown=marks))
    for token in ids[:-1]:
        choice.take(Delta("", 0, "", [token]))
    choice.take(Delta("", 0, "", ids[-1:], finish=Finish.STOP))
    assert "".join(choice.content) == said


@pytest.mark.parametrize(("said", "wanted"), [("a fox and a fox", "a fox and a "), ("a fox b f", "a fox b f")])
def test_stop_strings_beside_marks(said, wanted):
    """Cut out where the engine stopped for one; what came too early, before `min_tokens`, is text."""
    tokenizer = tiny_tokenizer((*SPECIAL, "[TOOL_CALLS]"))
    marks = special_marks(tokenizer, ("[TOOL_CALLS]",))
    ids = tokenizer.encode(said)
    for size in (1, 3):
        choice = Choice(stream=TextStream(tokenizer, ("fox",), shown=marks))
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        for part in parts:
            finish = None if part is not parts[-1] else Finish.STOP if wanted != said else Finish.LENGTH
            choice.take(Delta("", 0, "", part, finish=finish))
        assert "".join(choice.content) == wanted


def test_bytes_of_tokens():
    tokenizer = tiny_tokenizer()
    for text in (TEXT, "é 你 🤗", "<|im_end|>"):
        ids = tokenizer.encode(text, allow_special=True)
        assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()
    assert token_bytes(tokenizer, 10**6) is None
