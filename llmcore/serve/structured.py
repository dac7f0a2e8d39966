"""What an answer must look like: constraints of the engine from a request's fields."""

from __future__ import annotations

import asyncio
from typing import Any

from llmcore.serve.errors import ApiError
from llmcore.serve.job import Served
from llmcore.serve.protocol import ChatRequest, NamedTool, Sampling, Tool


async def constraint_of(served: Served, request: Sampling) -> Any:
    """The constraint that a request asks for, or None. It is compiled here once, beside the loop and the engine, so
    that a schema that is wrong is a 400, and one that takes long keeps nobody waiting."""
    kind, value = _wanted(request)
    if kind is None:
        return None
    try:
        return await asyncio.to_thread(_compile, served, kind, value)
    except ImportError as error:
        raise ApiError(str(error), param=_param(request), code="unsupported") from None
    except ValueError as error:
        raise ApiError(f"{_param(request)}: {error}", param=_param(request), code="invalid_schema") from None


def _wanted(request: Sampling) -> tuple[str | None, Any]:
    if request.guided_regex is not None:
        return "regex", request.guided_regex
    if request.guided_choice is not None:
        return "choice", request.guided_choice
    if isinstance(request, ChatRequest) and (tools := forced_tools(request)):
        return "json_schema", _call_schema(tools)
    form = request.response_format
    if form is None or form.type == "text":
        return None, None
    return ("json_object", None) if form.json_schema is None else ("json_schema", form.json_schema.schema_)


def _param(request: Sampling) -> str:
    for name in ("guided_regex", "guided_choice", "response_format"):
        if getattr(request, name) is not None:
            return name
    return "tool_choice"


def _compile(served: Served, kind: str, value: Any) -> Any:
    from llmcore.inference import constraints

    make = {
        "regex": constraints.Regex,
        "choice": constraints.Choice,
        "json_schema": constraints.JSONSchema,
        "json_object": lambda _: constraints.JSONObject(),
    }[kind]
    constraint = make(value)
    lm = served.language_model
    constraint.matcher(lm.tokenizer, lm.model.config.vocab_size, served.engine.engine.stop_ids)  # which keeps it
    return constraint


def forced_tools(request: ChatRequest) -> list[Tool]:
    """The tools of which one must be called."""
    if request.tool_choice == "required":
        return list(request.tools)
    if isinstance(request.tool_choice, NamedTool):
        return [tool for tool in request.tools if tool.function.name == request.tool_choice.function.name]
    return []


def _call_schema(tools: list[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": {"type": "object", **(tool.function.parameters or {})},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
