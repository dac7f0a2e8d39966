"""The requests of OpenAI's API, checked. What they don't know but we do stands under "beyond OpenAI's"."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from llmcore.inference.params import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP

MAX_MESSAGES, MAX_TOOLS, MAX_SCHEMA = 2048, 128, 1 << 16

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=1 << 22)]


class Model(BaseModel):
    """Unknown fields are refused: a setting that is silently ignored is a wrong answer."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Model):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class JsonSchemaFormat(Model):
    name: str = Field("schema", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _small(cls, schema: dict[str, Any]) -> dict[str, Any]:
        return _bounded(schema, "the schema")


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("accepted: json_schema with type 'json_schema', and with no other type")
        return self


class Sampling(Model):
    """What chats and texts have in common."""

    model: str
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    # taken, and without an effect on what is written
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # beyond OpenAI's
    top_k: int | None = Field(None, ge=1)
    min_p: Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(None, gt=0, le=1e6)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: StrictBool = False
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    guided_regex: str | None = Field(None, max_length=MAX_SCHEMA)
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=1024)

    @field_validator("stop")
    @classmethod
    def _stop(cls, stop: str | list[str] | None) -> list[str] | None:
        stop = [stop] if isinstance(stop, str) else stop
        if stop is not None and (len(stop) > MAX_STOP or any(not 0 < len(s) <= 1024 for s in stop)):
            raise ValueError(f"accepted: up to {MAX_STOP} strings of 1 to 1024 characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [key for key in bias or () if not (key.isascii() and key.isdecimal() and len(key) < 11)]:
            raise ValueError(f"accepted: token ids as keys, not {wrong[0][:40]!r}")
        return bias

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("accepted: stream_options with stream true alone")
        asked = [self.guided_regex, self.guided_choice,
                 None if self.response_format is None or self.response_format.type == "text" else True]  # fmt: skip
        if sum(one is not None for one in asked) > 1:
            raise ValueError("accepted: one of response_format, guided_regex and guided_choice")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1


class FunctionCall(Model):
    name: str
    arguments: Text | dict[str, Any]


class ToolCall(Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class TextPart(Model):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """Of a chat. Fields that an answer of ours or another server's has are taken, so that it can be sent back."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("accepted: a message with content, or the assistant's tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text as one string, the arguments of calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "id": call.id,
                 "function": {"name": call.function.name, "arguments": _object(call.function.arguments)}}
                for call in self.tool_calls
            ]  # fmt: skip
        return message


def _object(arguments: str | dict[str, Any]) -> Any:
    """The arguments as the object that templates write; as they are, where they are none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


class Function(Model):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _small(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if parameters is None else _bounded(parameters, "parameters")


class Tool(Model):
    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool = True
    modalities: list[Literal["text"]] | None = None
    # beyond OpenAI's
    strategy: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("accepted: top_logprobs with logprobs true alone")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("accepted: max_completion_tokens or max_tokens, not both")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("accepted: tools of different names")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("accepted: tool_choice with tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}; accepted: {', '.join(names)}")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: StrictBool = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise ValueError(f"best_of is {self.best_of}; accepted: n, which is {self.choices}")
        if self.suffix:
            raise ValueError("accepted: no suffix")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class EmbeddingRequest(Model):
    model: str
    input: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: Any = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]
        return list(self.input)


def _bounded(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema that is not absurdly large or deep: it goes into templates and compilers."""
    depth, level = 0, [schema]
    while level:
        depth += 1
        if depth > 64:
            raise ValueError(f"{name} nests deeper than the accepted 64 levels")
        children = [c for value in level for c in (value.values() if isinstance(value, dict) else value)]
        level = [child for child in children if isinstance(child, (dict, list))]
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > MAX_SCHEMA:
        raise ValueError(f"{name} has {size} characters; accepted: {MAX_SCHEMA}")
    return schema
