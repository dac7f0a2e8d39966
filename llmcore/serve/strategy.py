"""Chats that are answered by a strategy of test-time scaling: the field `strategy` of a request."""

from __future__ import annotations

from typing import Any

from llmcore.inference.sequence import Finish
from llmcore.serve.errors import ApiError, unavailable
from llmcore.serve.job import Served, for_clients
from llmcore.serve.protocol import ChatRequest
from llmcore.serve.sampling import sampling_params

_ALONE = ("stream", "n", "tools", "logprobs", "response_format", "guided_regex", "guided_choice")


async def by_strategy(served: Served, request: ChatRequest) -> dict[str, Any]:
    """The answer that a strategy chose, what it spent under `usage`, and how it came to it under `strategy`.

    Raises:
        ApiError: 400 for a wrong spec, or fields that a strategy has no use for; 503 when one of its requests ended
            without an answer.
    """
    from llmcore.inference.strategies import StrategyFailed, check_spec, run_strategy_async, token_bound

    if wrong := [name for name in _ALONE if getattr(request, name) not in (None, False)]:
        raise ApiError(f"{wrong[0]} and strategy are both given; accepted: one of them", param=wrong[0],
                       code="invalid_value")  # fmt: skip
    if not served.language_model.can_chat:
        raise ApiError(f"{served.name} has no chat template", param="messages", code="unsupported")
    params = sampling_params(served, request, max_tokens=request.most_tokens or 512, prompt_tokens=0, logprobs=None)
    messages = [message.for_template() for message in request.messages]
    with for_clients():
        check_spec(request.strategy)
        bound, most = token_bound(request.strategy, params.max_tokens), served.limits.max_choices * served.capacity
        if bound > most:
            raise ApiError(f"strategy may generate {bound} tokens; accepted: {most}", param="strategy",
                           code="invalid_value")  # fmt: skip
        try:
            result = await run_strategy_async(served.engine, messages, request.strategy, params)
        except StrategyFailed as error:
            raise unavailable(str(error), "generation_failed") from None
    message = {"role": "assistant", "content": result.text, "refusal": None}
    finish = "length" if result.chosen.finish is Finish.LENGTH else "stop"
    usage = result.usage
    return {
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.generated_tokens,
            "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
        "strategy": result.to_dict(),
    }
