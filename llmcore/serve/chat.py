"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from llmcore.inference.text import TextStream
from llmcore.serve.choices import Choice, chat_delta, chat_logprobs, special_marks
from llmcore.serve.errors import ApiError
from llmcore.serve.job import Job, Served
from llmcore.serve.protocol import ChatRequest
from llmcore.serve.reasoning import begins_in_thoughts, reasoning_parser
from llmcore.serve.sampling import sampling_params
from llmcore.serve.strategy import by_strategy
from llmcore.serve.streaming import EventStream
from llmcore.serve.structured import constraint_of, forced_tools
from llmcore.serve.tool_parsers import MARKERS, tool_parser

_TOOLS = """You can call these tools, given as one JSON object a line:
{tools}
To call one, write {call}"""
_CALLS = {
    "hermes": '<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.',
    "llama3": '{"name": NAME, "parameters": OBJECT} and nothing else.',
    "mistral": '[TOOL_CALLS][{"name": NAME, "arguments": OBJECT}] and nothing else.',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>OBJECT"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>.",
}


async def answer(job: Job, request: ChatRequest) -> Response:
    served = job.served
    served.adapter(request.model)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    if request.strategy is not None:
        return JSONResponse(head | {"object": "chat.completion"} | await by_strategy(served, request))
    encoding = asyncio.to_thread(_prompt, served, request)
    prompt, constraint = await asyncio.gather(encoding, constraint_of(served, request))
    params = sampling_params(
        served, request, max_tokens=request.most_tokens, prompt_tokens=len(prompt), constraint=constraint,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )  # fmt: skip
    await job.submit(prompt, params)
    inside = served.reasoning and begins_in_thoughts(served.language_model.tokenizer, prompt)
    choices = [_choice(served, request, inside) for _ in range(request.choices)]
    if request.stream:
        return EventStream(_events(job, request, choices, head | {"object": "chat.completion.chunk"}))
    async for _, delta in job.deltas():
        choices[delta.index].take(delta)
    entries = [_entry(served, request, index, choice) for index, choice in enumerate(choices)]
    return JSONResponse(head | {"object": "chat.completion", "choices": entries, "usage": job.usage()})


def _prompt(served: Served, request: ChatRequest) -> list[int]:
    """The tokens of the messages. Runs in a thread: templates are programs."""
    lm = served.language_model
    if not lm.can_chat:
        raise ApiError(f"{served.name} has no chat template; accepted: /v1/completions", param="messages",
                       code="unsupported")  # fmt: skip
    messages = [message.for_template() for message in request.messages]
    shown = () if request.tool_choice == "none" else request.tools or ()
    tools = [tool.model_dump(exclude_none=True) for tool in shown]
    template = lm.tokenizer.chat_template
    if tools and template is not None and "tools" not in template:  # it would not show them to the model
        messages, tools = _with_tools(messages, tools, served.tool_parser), []
    try:
        return lm.tokenizer.encode_chat(messages, add_generation_prompt=True, tools=tools or None)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"messages: {error}", param="messages", code="invalid_value") from None


def _with_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """The messages with the tools in the system message, and calls in the form that is parsed."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _TOOLS.format(tools=lines, call=_CALLS[form])
    system, rest = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    changed = [{"role": "system", "content": f"{system}\n\n{text}" if system else text}]
    for message in rest:
        for call in message.get("tool_calls", ()):
            written = json.dumps(call["function"], ensure_ascii=False)
            content = f"{message['content']}\n<tool_call>{written}</tool_call>"
            message = message | {"content": content.lstrip()}
        changed.append(message)
    return changed


def _choice(served: Served, request: ChatRequest, inside: bool) -> Choice:
    tokenizer = served.language_model.tokenizer
    tools = marks = None
    if request.tools and request.tool_choice != "none":
        form = "json" if forced_tools(request) else served.tool_parser
        tools, marks = tool_parser(form), special_marks(tokenizer, MARKERS[form])
    reasoning = reasoning_parser(inside) if served.reasoning else None
    if served.reasoning:
        marks = (marks or frozenset()) | special_marks(tokenizer, ("<think>", "</think>"))
    stream = TextStream(tokenizer, request.stop or (), shown=marks) if marks else None
    return Choice(reasoning, tools, one_call=not request.parallel_tool_calls, stream=stream)


def _entry(served: Served, request: ChatRequest, index: int, choice: Choice) -> dict[str, Any]:
    content = "".join(choice.content)
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not choice.calls else None}
    message["refusal"] = None
    if choice.thoughts:
        message["reasoning_content"] = "".join(choice.thoughts).rstrip()
    if choice.calls:
        message["tool_calls"] = choice.calls
    logprobs = None
    if request.logprobs:
        logprobs = chat_logprobs(served.language_model.tokenizer, choice.logprobs, request.top_logprobs or 0)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}


async def _events(
    job: Job, request: ChatRequest, choices: list[Choice], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    usage = request.stream_options is not None and request.stream_options.include_usage

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return head | {"choices": [choice]} | ({"usage": None} if usage else {})

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for _, delta in job.deltas():
        choice = choices[delta.index]
        parts = [chat_delta(event, choice) for event in choice.take(delta)]
        logprobs = None
        if delta.logprobs:
            tokenizer = job.served.language_model.tokenizer
            logprobs = chat_logprobs(tokenizer, delta.logprobs, request.top_logprobs or 0)
            parts = parts or [{}]
        for part in parts:
            yield chunk(delta.index, part, logprobs)
            logprobs = None
        if choice.finish is not None:
            yield chunk(delta.index, {}, finish=choice.finish)
    if usage:
        yield head | {"choices": [], "usage": job.usage()}
