"""Failures as OpenAI's error body. Messages name fields and rules, never the values that were sent."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from unspool.requests import EngineBusy, EngineDead, InvalidRequest

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
MAX_NAME_CHARS = 64
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it


@dataclass(eq=False)
class ApiError(Exception):
    """A request that gets no answer, and what its sender is told."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self._headers())

    def _headers(self) -> dict[str, str]:
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return {"Retry-After": str(RETRY_AFTER_SECONDS), **self.headers}
        if self.status == HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer", **self.headers}
        return dict(self.headers)


def invalid(param: str, message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {message}", param=param)


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, "server_error", code=code)


def internal_error() -> ApiError:
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request; its log says why", "server_error"
    )


def as_api_error(error: Exception) -> ApiError:
    """What the sender is told about any failure. Logs those that only the server's log may explain."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return invalid(error.field, error.message)
        case EngineBusy():
            return unavailable("the server is full; try again later", "server_busy")
        case EngineDead():
            return unavailable("the engine has stopped; the server must be restarted", "engine_dead")
        case HTTPException():
            phrase = HTTPStatus(error.status_code).phrase
            message = f"{phrase}: see /openapi.json for what is served"
            return ApiError(error.status_code, message, headers=error.headers or {})
        case _:
            logger.error("a request failed", exc_info=error)
            return internal_error()


def validation_error(error: ValidationError) -> ApiError:
    """The first thing wrong with a body, and how many more there are."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = _field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(path, "is not a field of this route")
    others = error.error_count() - 1
    suffix = f" ({others} more problems follow)" if others else ""
    return invalid(path, f"{first['msg'][0].lower()}{first['msg'][1:]}{suffix}")


def _field_path(location: tuple[int | str, ...]) -> str:
    """`messages[0].role`. A name comes from the sender when the field is unknown, so its length and letters are cut."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part[:MAX_NAME_CHARS]
            readable = name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
            path += f".{readable}" if path else readable
    return path or "body"


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


async def answer_bad_parameter(request: Request, error: Exception) -> JSONResponse:
    return ApiError(HTTPStatus.BAD_REQUEST, "a parameter of the address is not valid").response()


def add_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, InvalidRequest, EngineBusy, EngineDead, HTTPException):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(RequestValidationError, answer_bad_parameter)
