"""A model with all that it takes to use it on text: tokenizer, chat template and how it wants to be sampled."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmcore.inference.chat import fit_chat, fit_text
from llmcore.inference.engine import Engine
from llmcore.inference.generate import check_delta, room_for, seeds_of, token_ids
from llmcore.inference.params import SamplingParams
from llmcore.inference.perplexity import Perplexity, perplexity
from llmcore.inference.save_gguf import save_gguf
from llmcore.models import Transformer, save_pretrained
from llmcore.tokenizers import Tokenizer

_MAX_SEQUENCES = 64  # run at a time
_CONTEXT = 16384  # of a model whose context has no end
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class GenerationDefaults:
    """The settings of `LanguageModel.generate` that a call does not name."""

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Completion(NamedTuple):
    """What a prompt got. text: without what ended it; tokens and logprobs: of everything that was drawn;
    finish_reason: "stop" for a stop token or string, "length" for max_tokens; num_prompt_tokens: as they were run."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    num_prompt_tokens: int


class LanguageModel:
    """A model that takes and gives text; `llmcore.load` makes one.

    Attributes:
        model, tokenizer: the transformer, and its tokenizer with the chat template.
        stop_ids: the tokens that end a text or a turn.
        defaults: the settings that a call does not name.
        source: where it came from.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        stop_ids: Collection[int] = (),
        defaults: GenerationDefaults | None = None,
        source: str = "",
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; accepted: no "
                "more than the model"
            )
        ends = {*stop_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, frozenset(ends)
        self.defaults = defaults or GenerationDefaults()
        self.source = source
        self._idle: Engine | None = None  # what the last call ran on

    def __repr__(self) -> str:
        return f"LanguageModel({self.source or 'unnamed'}: {self.model.num_parameters():,} parameters)"

    @property
    def context_length(self) -> int | None:
        """The most tokens of a prompt and its continuation together; None: any number."""
        config = self.model.config
        return None if config.position == "none" else config.max_positions

    # ---- prompts

    @property
    def can_chat(self) -> bool:
        """Whether it has a chat template, or the tokens of the usual one."""
        return self.tokenizer.chat_template is not None or "<|im_start|>" in self.tokenizer.special_tokens

    def encode(self, prompt: Prompt, *, max_tokens: int = 0, context: str = "refuse") -> list[int]:
        """The token ids of a prompt: a text, the messages of a chat up to where the assistant answers, or token ids.

        Args:
            max_tokens: room to leave in the context.
            context: what happens to a prompt that is too long for that: "refuse", or "slide": a text loses its first
                tokens, a chat its oldest turns, but neither its system message nor its last one.

        Raises:
            ValueError: for an empty prompt, a prompt that is too long, or a chat without a template.
        """
        if context not in ("refuse", "slide"):
            raise ValueError(f"context is {context!r}; accepted: 'refuse', 'slide'")
        limit = None if self.context_length is None else self.context_length - max_tokens
        if _is_chat(prompt):
            if not self.can_chat:
                raise ValueError(f"{self.source or 'this model'} has no chat template; accepted: prompts that are text")
            return fit_chat(self._encode_chat, prompt, limit, context)
        ids = self._encode_text(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt is empty; accepted: at least one token")
        keep = int(ids[0] == self.tokenizer.bos_id)
        return fit_text(ids, limit, context, keep)

    def _encode_text(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_bos=self.tokenizer.adds_bos)
        if not ids:  # what begins a document: the end of the one before it
            starts = [i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None]
            ids = starts[-1:]
        return ids

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True)

    # ---- generation

    def complete(
        self, prompts: Sequence[Prompt], *, on_text: Callable[[int, str], None] | None = None, **settings: Any
    ) -> list[Completion]:
        """Continues every prompt, all of them together.

        Args:
            prompts: texts, chats or token ids.
            on_text: called as on_text(prompt_index, text) with each piece of text when it is there.
            settings: see `generate`.
        """
        run = _Run(self, prompts, settings)
        with contextlib.closing(run.pieces()) as pieces:
            for index, text in pieces:
                if on_text is not None:
                    on_text(index, text)
        return run.completions

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, stream: bool | Callable[[str], None] = False, **settings: Any
    ) -> str | list[str] | Iterator[str]:
        """Continues a prompt, or each of a list of prompts.

        Args:
            prompt: a text, the messages of a chat ({"role": ..., "content": ...}), token ids, or a list of texts, of
                chats or of token ids.
            stream: True gives an iterator over the pieces of text instead; a function is called with each of them. For
                one prompt.
            settings: what is not named, or None, is taken from `defaults`.
                max_tokens: the most new tokens.
                temperature, top_k, top_p, min_p: see `llmcore.ops.sample`; temperature 0 takes the likeliest token.
                repetition_penalty, presence_penalty, frequency_penalty: see `llmcore.ops.apply_penalties_`.
                seed: same seed, same text; or one for each prompt.
                stop: strings and token ids that end the text, beside the model's own; not part of it.
                context: "refuse" or "slide", see `encode`.

        Returns:
            The new text, or the list of them.

        Raises:
            ValueError: for a setting of an unknown name or out of its range, or a prompt that `encode` refuses.
        """
        one = isinstance(prompt, str) or _is_chat(prompt) or _is_ids(prompt)
        if stream is not False and not one:
            raise ValueError(f"stream is {stream!r} with {len(prompt)} prompts; accepted: for one prompt")
        if stream is True:
            run = _Run(self, [prompt], settings)
            return (text for _, text in run.pieces())
        show = None if stream is False else lambda _, text: stream(text)
        texts = [done.text for done in self.complete([prompt] if one else prompt, on_text=show, **settings)]
        return texts[0] if one else texts

    def chat(self, messages: Sequence[Message], **settings: Any) -> str | Iterator[str]:
        """The assistant's answer to a chat; settings as for `generate`."""
        if not _is_chat(messages):
            raise ValueError(f"messages are {messages!r}; accepted: a list of mappings with 'role' and 'content'")
        return self.generate(messages, **settings)

    @contextlib.contextmanager
    def idle_engine(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Engine]:
        """An engine that nobody uses, with a cache for these prompts. One with room for a context or two is kept
        for the next call, so that a chat finds the keys and values of its earlier turns. Its cache has at most twice
        the room that a call needed, and goes when the weights have changed."""
        room = room_for(prompts, max_tokens, most=_MAX_SEQUENCES) | {"max_sequences": _MAX_SEQUENCES}
        small = room["cache_tokens"] <= 2 * (self.context_length or _CONTEXT)
        if small:
            room["cache_tokens"] = max(1024, 1 << (room["cache_tokens"] - 1).bit_length())
        weights = _weights(self.model)
        idle, self._idle = self._idle, None  # a call meanwhile makes its own
        engine = None if idle is None or idle[1] != weights or idle[0].cache_tokens < room["cache_tokens"] else idle[0]
        del idle
        engine = engine or Engine.from_language_model(self, **room)
        was_training = self.model.training
        self.model.eval()
        try:
            yield engine
        finally:
            self.model.train(was_training)
            if small:
                self._idle = engine, weights

    def perplexity(self, text: str, window: int | None = None, stride: int | None = None) -> Perplexity:
        """How well the model foretells a text: see `llmcore.inference.perplexity`."""
        ids = self.tokenizer.encode(text, add_bos=self.tokenizer.adds_bos)
        return perplexity(self.model, ids, window=window, stride=stride)

    # ---- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `transformers` loads: configuration, weights, tokenizer, chat template, generation
        settings. `llmcore.load` gives every weight back bit for bit.

        Raises:
            ValueError: when no family of `transformers` describes the model.
        """
        folder = Path(folder)
        save_pretrained(self.model, folder)
        self.tokenizer.save(folder)
        tokens = {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": sorted(self.stop_ids) or None,
            "pad_token_id": self.tokenizer.pad_id,
        }
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | tokens
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", tokens | _generation_config(self.defaults))

    def save_gguf(self, path: str | Path, format: str = "f16") -> None:
        """Writes a GGUF file in "f16", "bf16", "q8_0" or "q4_0": see `llmcore.inference.save_gguf.save_gguf`."""
        save_gguf(self.model, self.tokenizer, path, format=format, stop_ids=self.stop_ids)


def _weights(model: Transformer) -> list[tuple[int, int]]:
    """What tells the model's weights from others: where they lie, and how often torch has written to them."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, torch.Tensor):
        return prompt.ndim == 1
    return len(prompt) > 0 and isinstance(prompt[0], int)


class _Run:
    """One call of `complete`."""

    def __init__(self, owner: LanguageModel, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        names = {f.name for f in dataclasses.fields(GenerationDefaults)}
        if unknown := sorted(settings.keys() - names - {"seed", "stop", "context"}):
            accepted = ", ".join(sorted(names | {"seed", "stop", "context"}))
            raise ValueError(f"{unknown[0]!r} is no setting of generation; accepted: {accepted}")
        values = dataclasses.asdict(owner.defaults)
        values |= {name: settings[name] for name in names if settings.get(name) is not None}
        strings, ids = _split_stop(settings.get("stop"))
        max_tokens, context = values["max_tokens"], settings.get("context") or "refuse"
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens!r}; accepted: 1 or more")
        inputs = [owner.encode(prompt, max_tokens=max_tokens, context=context) for prompt in prompts]
        self.owner, self.inputs = owner, token_ids(inputs, max_tokens, owner.model.config)
        # seeds are checked, and so are settings, even where there is no prompt
        self.params = [
            SamplingParams(**values, seed=seed, stop=strings, stop_token_ids=ids, logprobs=0)
            for seed in seeds_of(settings.get("seed"), max(1, len(inputs)))
        ]
        self.completions = [Completion("", [], [], "length", len(ids)) for ids in self.inputs]

    def pieces(self) -> Iterator[tuple[int, str]]:
        if not self.inputs:
            return
        parts: list[list[str]] = [[] for _ in self.inputs]
        with self.owner.idle_engine(self.inputs, self.params[0].max_tokens) as engine:
            for index, delta in engine.stream(self.inputs, self.params):
                check_delta(index, delta)
                done = self.completions[index]
                done.tokens.extend(delta.tokens)
                done.logprobs.extend(told.logprob for told in delta.logprobs or ())
                parts[index].append(delta.text)
                if delta.finish is not None:
                    self.completions[index] = done._replace(
                        text="".join(parts[index]), finish_reason=delta.finish.value
                    )
                if delta.text:
                    yield index, delta.text


def _split_stop(stop: Any) -> tuple[list[str], frozenset[int]]:
    items = [] if stop is None else [stop] if isinstance(stop, (str, int)) else list(stop)
    if wrong := [item for item in items if not isinstance(item, (str, int)) or item == ""]:
        raise ValueError(f"stop holds {wrong[0]!r}; accepted: strings that are not empty, and token ids")
    return [item for item in items if isinstance(item, str)], frozenset(i for i in items if isinstance(i, int))


def _generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """A generation_config.json of `transformers`."""
    values: dict[str, Any] = {"do_sample": defaults.temperature > 0, "max_new_tokens": defaults.max_tokens}
    if defaults.temperature > 0:
        sampling = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        # there an absent top_k means 50, here None means none
        values |= {name: value for name, value in sampling.items() if value is not None}
        values["top_k"] = defaults.top_k or 0
    if defaults.repetition_penalty != 1.0:
        values["repetition_penalty"] = defaults.repetition_penalty
    return values


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
