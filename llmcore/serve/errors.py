"""What a client is told when a request cannot be served, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

RETRY_AFTER = 2  # seconds


class ApiError(Exception):
    """An answer of `status` instead of a result. `param`: the field that is wrong; `code`: for programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers or {}

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 503: "overloaded_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def unavailable(message: str, code: str) -> ApiError:
    """503, the one answer of the 500s: not now."""
    return ApiError(message, status=503, code=code, headers={"Retry-After": str(RETRY_AFTER)})


def timed_out(seconds: float) -> ApiError:
    """408, which the official client would run anew if it were not told that this is in vain."""
    message = f"the request was not done within {seconds:g} s; ask for fewer tokens"
    return ApiError(message, status=408, code="timeout", headers={"x-should-retry": "false"})


def invalid(error: ValidationError) -> ApiError:
    """400 with the first thing that pydantic found wrong, and the value."""
    errors = error.errors(include_url=False, include_context=False)
    # of a union's branches the one that got furthest is what was meant
    first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    message = first["msg"].removeprefix("Value error, ").replace("Input should be ", "accepted: ")
    if first["type"] == "json_invalid":
        return ApiError(f"the body is no JSON in UTF-8: {message}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(f"{place} is no field of this request", param=place, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"{place} is missing", param=place, code="missing_required_parameter")
    return ApiError(f"{place or 'the body'} is {_shown(first['input'])}; {message}", param=place or None,
                    code="invalid_value")  # fmt: skip


def _is_branch(part: str | int) -> bool:
    """Whether it is pydantic's name for a member of a union, such as list[str], and no field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part or "-" in part)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
