"""What a strategy is to answer, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmcore.inference.params import MAX_CHOICES, SamplingParams
from llmcore.inference.sequence import Completion, Finish, RequestOutput
from llmcore.tokenizers import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class Ask(NamedTuple):
    """A request that a strategy makes of an engine."""

    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Problem:
    """A prompt with all that a strategy needs to go on from it.

    Attributes:
        prompt: a text, the messages of a chat up to where the assistant answers, or token ids.
        tokens: the prompt as it is run.
        stop_ids: tokens that end a text.
        max_choices: the most that one request may ask for.
        max_length: the most tokens of a prompt and its continuation; None: any number.
    """

    prompt: str | tuple[Message, ...] | tuple[int, ...]
    tokens: list[int]
    tokenizer: Tokenizer | None = None
    stop_ids: frozenset[int] = frozenset()
    max_choices: int = MAX_CHOICES
    max_length: int | None = None

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: Tokenizer | None = None, **options: Any) -> Problem:
        """Encodes a prompt; options are the other attributes.

        Raises:
            ValueError: for an empty prompt, or text or messages without a tokenizer.
        """
        if not isinstance(prompt, str):
            prompt = tuple(prompt)
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if tokenizer is None and (chat or isinstance(prompt, str)):
            raise ValueError("the prompt is text, but there is no tokenizer; accepted: token ids")
        if chat:
            tokens = tokenizer.encode_chat(prompt, add_generation_prompt=True)
        elif isinstance(prompt, str):
            tokens = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)
        else:
            prompt = tuple(int(token) for token in prompt)
            tokens = list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty; accepted: at least one token")
        return cls(prompt, tokens, tokenizer, **options)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], Mapping)

    @property
    def question(self) -> str:
        """What is asked, as text: of a chat the last message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return _content(self.prompt[-1]) if self.is_chat else self.decode(self.tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones; "" where there is no tokenizer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer is not None else ""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The tokens of a text; with `allow_special` control tokens may be spelled out in it."""
        if self.tokenizer is None:
            raise ValueError(f"{text!r} is text, but there is no tokenizer; accepted: strategies that write none")
        return self.tokenizer.encode(text, allow_special=allow_special)

    def with_prompt(self, prompt: Prompt) -> Problem:
        return dataclasses.replace(self, **_prompt_and_tokens(Problem.of(prompt, self.tokenizer)))

    def instructed(self, instruction: str) -> Problem:
        """The same question, followed by how to answer it."""
        if self.is_chat:
            *before, last = self.prompt
            return self.with_prompt([*before, {**last, "content": f"{_content(last)}\n\n{instruction}"}])
        if isinstance(self.prompt, str):
            return self.with_prompt(f"{self.prompt}\n\n{instruction}\n")
        return self.with_prompt([*self.prompt, *self.encode(f"\n\n{instruction}\n")])

    def followed(self, answer: str, message: str) -> Problem:
        """What comes after an answer: the user's next message."""
        if self.is_chat:
            turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": message}]
            return self.with_prompt([*self.prompt, *turns])
        if isinstance(self.prompt, str):
            return self.with_prompt(f"{self.prompt}{answer}\n\n{message}\n")
        return self.with_prompt([*self.prompt, *self.encode(f"{answer}\n\n{message}\n")])

    def stops(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a text under these params."""
        return params.stop_token_ids | (frozenset() if params.ignore_eos else self.stop_ids)

    def most_tokens(self, params: SamplingParams) -> int:
        """The new tokens that the params allow for.

        Raises:
            ValueError: when there is no bound, or no room for so many.
        """
        room = None if self.max_length is None else self.max_length - len(self.tokens)
        wanted = params.max_tokens if params.max_tokens is not None else room
        if wanted is None:
            raise ValueError("max_tokens is None; accepted for a model without a longest sequence: 1 or more")
        if room is not None and not 1 <= wanted <= room:
            raise ValueError(
                f"the prompt has {len(self.tokens)} tokens and max_tokens is {params.max_tokens}; accepted: together "
                f"at most {self.max_length}"
            )
        return wanted


def _prompt_and_tokens(problem: Problem) -> dict[str, Any]:
    return {"prompt": problem.prompt, "tokens": problem.tokens}


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"a message's content is {content!r}; accepted with a strategy: text")
    return content


@dataclass(frozen=True)
class Candidate:
    """A text that may be the answer.

    Attributes:
        answer: what was extracted from the text; None: nothing was found.
        logprob: the sum of its tokens' log-probabilities, where they were asked for.
        score: by the strategy's scorer, where it has one.
        reasoning: what the model thought before the text.
        finish: None: the text is not at its end yet.
    """

    text: str
    tokens: list[int]
    finish: Finish | None = None
    answer: str | None = None
    logprob: float | None = None
    score: float | None = None
    reasoning: str | None = None

    @classmethod
    def of(cls, choice: Completion, extract: Any = None) -> Candidate:
        logprob = None if choice.logprobs is None else sum(t.logprob for t in choice.logprobs)
        answer = None if extract is None else extract(choice.text)
        return cls(choice.text, list(choice.tokens), choice.finish, answer, logprob)


class Point(NamedTuple):
    """Where a strategy stood when it had generated so many tokens: the answer it would have given, and its score."""

    tokens: int
    answer: str | None
    score: float | None


@dataclass(frozen=True)
class Usage:
    """What was run. Prompts count once for a request whatever its choices; `cached_tokens` of them were in the cache.
    What a scorer runs outside the engine is not in it."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def plus(self, outputs: Sequence[RequestOutput]) -> Usage:
        return Usage(
            self.requests + len(outputs),
            self.prompt_tokens + sum(len(o.prompt_tokens) for o in outputs),
            self.cached_tokens + sum(o.cached_tokens for o in outputs),
            self.generated_tokens + sum(len(c.tokens) for o in outputs for c in o.choices),
        )


@dataclass(frozen=True)
class StrategyResult:
    """What a strategy found.

    Attributes:
        strategy: its name.
        chosen: the answer; its score is the strategy's (a share of votes, a reward, a log-probability).
        candidates: all that it chose from, in the order in which they came.
        curve: the tokens spent against the answer and its score, as it went.
        usage: the tokens spent in all.
        details: what else the strategy has to tell.
    """

    strategy: str
    chosen: Candidate
    candidates: list[Candidate] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.chosen.text

    @property
    def answer(self) -> str | None:
        return self.chosen.answer

    @property
    def score(self) -> float | None:
        return self.chosen.score

    def to_dict(self, candidates: bool = False) -> dict[str, Any]:
        """For JSON; with `candidates` those too, without their tokens."""

        def plain(candidate: Candidate) -> dict[str, Any]:
            values = {f.name: getattr(candidate, f.name) for f in dataclasses.fields(candidate) if f.name != "tokens"}
            return values | {
                "finish": None if candidate.finish is None else candidate.finish.value,
                "num_tokens": len(candidate.tokens),
            }

        result = {
            "strategy": self.strategy, **plain(self.chosen), "curve": [point._asdict() for point in self.curve],
            "usage": dataclasses.asdict(self.usage), "details": self.details,
        }  # fmt: skip
        return result | {"candidates": [plain(c) for c in self.candidates]} if candidates else result
