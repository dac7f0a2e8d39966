"""The Jinja environment that chat templates run in.

Jinja's immutable sandbox keeps a template from the system; what it does not bound, this one does: time, and the size of
what a template builds. Loops and macros look at the clock at each turn, and what can make a long text or list out of
short ones is asked first. So a template that would not end, or would fill the memory, is an error.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping, Sized
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment, SecurityError

MAX_SECONDS = 5.0
MAX_SIZE = 1 << 24  # characters of a text, elements of a list, bits of a number
_MAX_PARTS = 1 << 20  # of nested lists and mappings, all counted
_MAX_NUMBER = 1 << 20  # for a width or a count
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")
_WIDE_BRACES = re.compile(r"\d{5}")

_budget: ContextVar[list[float]] = ContextVar("budget")  # when time is up, and how much may still be written


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """As its base, with bounds on each `render`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)  # text without a bound
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that is asked before it makes something large."""

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            text = next((value for value in values if isinstance(value, str)), "")
            _check_call(name, text, [value for value in values if value is not text])
            return function(*args, **kwargs)

        self.filters[name] = guarded

    def bounded(self, source: str) -> jinja2.Template:
        """The template, with the questions put in. They are the environment's, so a template can't replace them."""
        tree = self.parse(source)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        for node in list(tree.find_all(nodes.Output)):
            node.nodes = [
                part if isinstance(part, nodes.TemplateData) else _call("written", [part], node.lineno)
                for part in node.nodes
            ]
        _replace_joins(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """Renders a template of `bounded`.

        Raises:
            SecurityError: where it would pass a bound.
        """
        token = _budget.set([time.monotonic() + MAX_SECONDS, float(MAX_SIZE)])
        try:
            return template.render(values)
        finally:
            _budget.reset(token)

    def tick(self) -> str:
        if time.monotonic() > _budget.get()[0]:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} s")
        return ""

    def written(self, value: Any) -> Any:
        """Passes on what is written, counted."""
        budget = _budget.get()
        budget[1] -= _weigh(value)
        if budget[1] < 0:
            raise SecurityError(f"it writes more than {MAX_SIZE} characters")
        return value

    def joined(self, *values: Any) -> str:
        """The ~ operator."""
        _weigh(values)
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        elif operator == "*":
            sized, count = (left, right) if isinstance(left, Sized) else (right, left)
            if isinstance(sized, Sized) and isinstance(count, int):
                _check_size(len(sized) * count)
            elif numbers:
                _check_size(left.bit_length() + right.bit_length())
        elif operator == "**" and numbers:
            _check_size(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_call("%", left, [right])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str):
            if function.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
            _check_call(function.__name__, owner, [*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes something of more than {MAX_SIZE} parts")


def _weigh(value: Any) -> int:
    """About how many characters a value has when it is written out, however often its parts are in it."""
    total, parts, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        parts += 1
        total += len(one) if isinstance(one, str) else 8
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        if total > MAX_SIZE or parts + len(waiting) > _MAX_PARTS:
            raise SecurityError(f"it handles something of more than {MAX_SIZE} characters or {_MAX_PARTS} parts")
    return total


def _check_call(name: str, text: str, values: list[Any]) -> None:
    """Before a method or filter of a text, which could make a much longer one."""
    _weigh(values)
    numbers = [abs(value) for value in values if isinstance(value, int)]
    texts = [len(value) for value in values if isinstance(value, str)]
    if max(numbers, default=0) > _MAX_NUMBER:
        raise SecurityError(f"{name} has a number above {_MAX_NUMBER}")
    if name in ("expandtabs", "indent", "wordwrap"):
        width = max([*numbers, *texts], default=8)
        _check_size((text.count("\n") + text.count("\t") + 1) * width + len(text))
    elif name in ("replace", "translate"):
        _check_size((len(text) + 1) * max(texts, default=1))
    elif name == "join":
        counts = [len(v) if isinstance(v, Sized) else MAX_RANGE for v in values if not isinstance(v, (str, int))]
        _check_size(max([len(text), *texts]) * max(counts, default=0))
    elif (name == "%" and _WIDE_PERCENT.search(text)) or (name.startswith("format") and _is_wide(text)):
        raise SecurityError(f"the format {text[:40]!r} is too wide")


def _is_wide(text: str) -> bool:
    return bool(_WIDE_BRACES.search(text) or _WIDE_PERCENT.search(text))


def _call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=line)


def _replace_joins(node: nodes.Node) -> None:
    for field in node.fields:
        value = getattr(node, field)
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            if not isinstance(item, nodes.Node):
                continue
            _replace_joins(item)
            if isinstance(item, nodes.Concat):
                items[index] = _call("joined", item.nodes, item.lineno)
        if not isinstance(value, list):
            setattr(node, field, items[0])
