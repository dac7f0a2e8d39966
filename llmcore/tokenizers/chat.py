"""Chat templates: Jinja text that turns a list of messages into the one string a model was trained on.

A template comes with a downloaded model, so it is untrusted: it runs in a sandbox that keeps it from the system and
bounds its time and what it makes (`sandbox.py`). Templates written for transformers' `apply_chat_template` find what
they use there: `tojson` with its options, `raise_exception`, `strftime_now`, `{% generation %}` and loop controls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension

from .sandbox import BoundedEnvironment

#: ChatML (one `<|im_start|>role ... <|im_end|>` block a message); tools are JSON lines in the system message.
DEFAULT_CHAT_TEMPLATE = r"""{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
<|im_start|>system
{% if has_system %}{{ messages[0].content + '\n\n' }}{% endif -%}
You can call these tools, given as one JSON object a line:
{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor -%}
To call one, write <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.content and message.content is not string -%}
{{ raise_exception('the content of message ' ~ loop.index0 ~ ' is not text') }}
{%- endif -%}
{%- if not (tools and has_system and loop.first) -%}
<|im_start|>{{ message.role + '\n' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
{{ '\n' if message.content or not loop.first }}<tool_call>
{{- '{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments + '}' -}}
</tool_call>
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape < and > for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; the text is that of its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.bounded(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render `messages` (mappings with at least a string `role`) with a Jinja chat template.

    `variables` are further names the template may use (`bos_token`, ...). Raises ValueError for malformed messages,
    a template that doesn't compile, that does what the sandbox forbids, runs for seconds, or refuses the messages.
    """
    if not messages or isinstance(messages, (str, bytes, Mapping)):
        raise ValueError(f"a chat needs a non-empty list of messages, not {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must be a mapping with a string 'role', not {message!r}")
    try:
        compiled = _compile(template)
        return compiled.environment.render(
            compiled,
            {
                **(variables or {}),
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
        )
    except Exception as error:  # a template is a program: it can fail in any way, SyntaxError and MemoryError included
        raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error
