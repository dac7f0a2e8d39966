"""From a request's fields to the engine's parameters."""

from __future__ import annotations

from typing import Any

from llmcore.inference.language_model import GenerationDefaults
from llmcore.inference.params import SamplingParams
from llmcore.serve.errors import ApiError
from llmcore.serve.job import Served
from llmcore.serve.protocol import Sampling


def sampling_params(
    served: Served,
    request: Sampling,
    *,
    max_tokens: int | None,
    prompt_tokens: int,
    logprobs: int | None,
    constraint: Any = None,
    **more: Any,
) -> SamplingParams:
    """What a request asks for; what it doesn't name is the model's own setting.

    Args:
        max_tokens: as asked for; None: what the context holds behind a prompt of `prompt_tokens`.

    Raises:
        ApiError: 400 for a value that this server does not accept.
    """
    defaults = served.language_model.defaults
    values = {
        name: given if (given := getattr(request, name)) is not None else getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", *_PENALTIES)
    }
    values |= {
        "max_tokens": _max_tokens(served, max_tokens, prompt_tokens),
        "min_tokens": request.min_tokens or 0,
        "seed": request.seed,
        "n": _choices(served, request.choices),
        "stop": tuple(request.stop or ()),
        "stop_token_ids": frozenset(request.stop_token_ids or ()),
        "ignore_eos": request.ignore_eos,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "logprobs": logprobs,
        "constraint": constraint,
        "adapter": served.adapter(request.model),
    }
    try:
        return SamplingParams(**values, **more)
    except ValueError as error:
        raise ApiError(str(error), code="invalid_value") from None


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
assert all(hasattr(GenerationDefaults, name) for name in _PENALTIES)


def _max_tokens(served: Served, asked: int | None, prompt_tokens: int) -> int:
    limit, room = served.limits.max_tokens, served.capacity - prompt_tokens
    if asked is not None and limit is not None and asked > limit:
        raise ApiError(f"max_tokens is {asked}; accepted: 1 to {limit}", param="max_tokens", code="invalid_value")
    wanted = 1 if asked is None else asked
    if wanted > room:
        text = f"the prompt has {prompt_tokens} tokens" + ("" if asked is None else f" and max_tokens is {asked}")
        raise ApiError(
            f"{text}; accepted: together at most {served.capacity}, the model's context", param="max_tokens",
            code="context_length_exceeded",
        )  # fmt: skip
    if asked is not None:
        return asked
    return room if limit is None else min(room, limit)


def _choices(served: Served, asked: int) -> int:
    most = min(served.limits.max_choices, served.engine.engine.scheduler.max_sequences)
    if asked > most:
        raise ApiError(f"n is {asked}; accepted: 1 to {most}", param="n", code="invalid_value")
    return asked


def check_prompts(served: Served, prompts: int, choices: int) -> None:
    """400 for more texts than one request may ask for."""
    if not 1 <= prompts * choices <= served.limits.max_choices:
        raise ApiError(
            f"{prompts} prompts with n = {choices} are {prompts * choices} choices; accepted: 1 to "
            f"{served.limits.max_choices}", param="prompt", code="invalid_value",
        )  # fmt: skip
