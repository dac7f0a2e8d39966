"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from llmcore.inference.sequence import TokenLogprob
from llmcore.serve.choices import Choice, completion_logprobs
from llmcore.serve.errors import ApiError
from llmcore.serve.job import Job, Served
from llmcore.serve.protocol import CompletionRequest
from llmcore.serve.sampling import check_prompts, sampling_params
from llmcore.serve.streaming import EventStream
from llmcore.serve.structured import constraint_of

_DEFAULT_TOKENS = 16  # as OpenAI has it for this endpoint


async def answer(job: Job, request: CompletionRequest) -> Response:
    served = job.served
    served.adapter(request.model)
    check_prompts(served, len(request.prompts), request.choices)
    prompts = await asyncio.to_thread(lambda: [_tokens(served, prompt) for prompt in request.prompts])
    constraint = await constraint_of(served, request)
    for tokens in prompts:
        params = sampling_params(
            served, request, max_tokens=request.max_tokens or _DEFAULT_TOKENS, prompt_tokens=len(tokens),
            logprobs=request.logprobs, constraint=constraint,
            prompt_logprobs=request.logprobs if request.echo else None,
        )  # fmt: skip
        await job.submit(tokens, params)
    writer = _Writer(served, request, prompts)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": request.model,
    }  # fmt: skip
    if request.stream:
        return EventStream(_events(job, request, writer, head))
    parts: dict[int, list[dict[str, Any]]] = {}
    async for prompt, delta in job.deltas():
        part = writer.part(prompt, delta)
        parts.setdefault(part["index"], []).append(part)
    choices = [_joined(parts[index]) for index in sorted(parts)]
    return JSONResponse(head | {"choices": choices, "usage": job.usage()})


def _tokens(served: Served, prompt: str | list[int]) -> list[int]:
    """The tokens of a prompt as `LanguageModel.encode` makes them, so an empty text begins a document."""
    try:
        tokens = served.language_model.encode(prompt)
    except (ValueError, TypeError) as error:
        raise ApiError(f"prompt: {error}", param="prompt", code="invalid_value") from None
    vocab = served.language_model.model.config.vocab_size
    if wrong := [token for token in tokens if token >= vocab]:
        raise ApiError(f"prompt holds token id {wrong[0]}; accepted: 0 to {vocab - 1}", param="prompt",
                       code="invalid_value")  # fmt: skip
    return tokens


class _Writer:
    """Makes parts of choices of deltas. Choice j of prompt i has index i * n + j."""

    def __init__(self, served: Served, request: CompletionRequest, prompts: list[list[int]]) -> None:
        self._served, self._request, self._prompts = served, request, prompts
        self._tokenizer = served.language_model.tokenizer
        count = len(prompts) * request.choices
        self._choices, self._begun, self._offsets = [Choice() for _ in range(count)], [False] * count, [0] * count
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def part(self, prompt: int, delta: Any) -> dict[str, Any]:
        """What a delta adds to its choice."""
        request, index = self._request, prompt * self._request.choices + delta.index
        choice = self._choices[index]
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = delta.prompt_logprobs
        text = "".join(event.text for event in choice.take(delta))
        tokens, logprobs = list(delta.tokens), list(delta.logprobs or [])
        if request.echo and not self._begun[index]:
            text = self._tokenizer.decode(self._prompts[prompt], skip_special_tokens=True) + text
            tokens = self._prompts[prompt] + tokens
            logprobs = self._prompt_logprobs.get(prompt, [None] * len(self._prompts[prompt])) + logprobs
        self._begun[index] = True
        told = None
        if request.logprobs is not None:
            told = completion_logprobs(self._tokenizer, logprobs, tokens, self._offsets[index])
            if told["tokens"]:
                self._offsets[index] = told["text_offset"][-1] + len(told["tokens"][-1])
        return {"index": index, "text": text, "logprobs": told, "finish_reason": choice.finish}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    logprobs = None
    if parts[0]["logprobs"] is not None:
        logprobs = {name: [x for part in parts for x in part["logprobs"][name]] for name in parts[0]["logprobs"]}
    return parts[-1] | {"text": "".join(part["text"] for part in parts), "logprobs": logprobs}


async def _events(
    job: Job, request: CompletionRequest, writer: _Writer, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    usage = request.stream_options is not None and request.stream_options.include_usage
    async for prompt, delta in job.deltas():
        part = writer.part(prompt, delta)
        if part["text"] or part["logprobs"] or part["finish_reason"]:
            yield head | {"choices": [part]} | ({"usage": None} if usage else {})
    if usage:
        yield head | {"choices": [], "usage": job.usage()}
