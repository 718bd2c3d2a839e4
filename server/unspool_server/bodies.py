"""From bytes to a checked request: JSON within bounds, then the route's schema. Parses off the event loop."""

import asyncio
import json
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from unspool_server.errors import CLIENT_CLOSED_REQUEST, ApiError, validation_error
from unspool_server.service import service_of

MAX_DEPTH = 32
MAX_MEMBERS = 2048

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body]) -> Body:
    """The request's body as a `schema`. Raises ApiError that says which field is wrong and how."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body as JSON with Content-Type: application/json")
    service = service_of(request)
    raw = await _receive(request, service.settings.body_timeout)
    return await service.prepare(parse_body, raw, schema)


async def _receive(request: Request, seconds: int) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await request.body()
    except TimeoutError:
        message = f"the body did not arrive within {seconds} seconds"
        headers = {"Connection": "close"}
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, message, code="body_timeout", headers=headers) from None
    except ClientDisconnect:  # nobody is left to be answered; the status is for the log
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client left before its request was complete") from None


def parse_body(raw: bytes, schema: type[Body]) -> Body:
    values = _parse_json(raw)
    _check_shape(values)
    if not isinstance(values, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise validation_error(error) from None


def describe_body(schema: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says about a route that reads its body by `read_body`."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(schema.model_json_schema())}},
        }
    }


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions put where they are referred to, as OpenAPI has no place for them."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        return {name: resolve(value) for name, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_complex() from None
    except ValueError:  # not UTF-8, not JSON, or a number with too many digits
        raise ApiError(HTTPStatus.BAD_REQUEST, "the body is not valid JSON in UTF-8") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_shape(root: Any) -> None:
    """Bounds nesting and members of an object, before a validator spends time or memory on them."""
    level = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if type(node) is dict:
                if len(node) > MAX_MEMBERS:
                    raise _too_complex()
                below.extend(item for item in node.values() if type(item) in (dict, list))
            elif type(node) is list:
                below.extend(item for item in node if type(item) in (dict, list))
        if not below:
            return
        level = below
    raise _too_complex()


def _too_complex() -> ApiError:
    message = f"the body nests deeper than {MAX_DEPTH} levels, or an object has more than {MAX_MEMBERS} members"
    return ApiError(HTTPStatus.BAD_REQUEST, message)
