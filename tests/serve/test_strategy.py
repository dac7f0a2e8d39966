"""What the strategies' own failures are to a client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from llmcore.inference import strategies
from llmcore.serve import strategy
from llmcore.serve.errors import ApiError
from llmcore.serve.limits import Limits
from llmcore.serve.protocol import ChatRequest


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (strategies.StrategyFailed("a request of the strategy was aborted"), 503, "generation_failed"),
        (RecursionError("maximum recursion depth exceeded"), 400, "invalid_value"),  # of a chat template
        (ValueError("the prompt is empty"), 400, "invalid_value"),
    ],
)
def test_failures(error, status, code, monkeypatch):
    async def fails(*_):
        raise error

    monkeypatch.setattr(strategies, "run_strategy_async", fails)
    monkeypatch.setattr(strategy, "sampling_params", lambda *_, **__: SimpleNamespace(max_tokens=4))
    served = SimpleNamespace(
        language_model=SimpleNamespace(can_chat=True), limits=Limits(), capacity=64, engine=None, name="tiny"
    )
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}],
             "strategy": {"name": "self-consistency", "n": 2}}  # fmt: skip
    with pytest.raises(ApiError, match=str(error)) as raised:
        asyncio.run(strategy.by_strategy(served, ChatRequest.model_validate(asked)))
    assert (raised.value.status, raised.value.code) == (status, code)
