"""What every request passes before a route sees it: its id, its key, its size. ASGI only; knows no route."""

import re
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unspool_server.errors import ApiError, as_api_error
from unspool_server.keys import KeyRing

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
OWNER = "unspool.owner"
"""Where a request's scope says whose it is."""
ANYONE = "anyone"
"""The owner of everything on a server without keys."""
LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class RequestIds:
    """Gives every reply an X-Request-Id, the sender's own if it is well formed, and every failure an error body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # a bug must reach the sender as an error body, and the log as a traceback
            if started:
                raise
            await as_api_error(error).response()(scope, receive, send_with_id)


class Authentication:
    """Refuses whatever carries no valid key, but for a few public paths.

    Without keys it lets all requests through, or with `loopback_only` those that name this machine: a web page that
    points its own host name at 127.0.0.1 must not get to ask.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, loopback_only: bool) -> None:
        self._app = app
        self._keys = keys
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            try:
                scope[OWNER] = self._owner(Headers(scope=scope))
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, headers: Headers) -> str:
        """Whose request it is. Raises ApiError when nobody's."""
        if not self._keys:
            if self._loopback_only and not LOOPBACK_HOST.fullmatch(headers.get("host", "")):
                message = "this server has no key and answers to localhost only; set one to use another name"
                raise ApiError(HTTPStatus.FORBIDDEN, message, "permission_error", code="host_not_allowed")
            return ANYONE
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _unauthenticated("send a key: Authorization: Bearer KEY")
        owner = self._keys.owner(key.strip().encode("latin-1"))
        if owner is None:
            raise _unauthenticated("the key is not valid")
        return owner


def owner_of(request: Request) -> str:
    """Who sent a request that has passed `Authentication`."""
    owner = request.scope[OWNER]
    assert isinstance(owner, str)
    return owner


def _unauthenticated(message: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, message, "authentication_error", code="invalid_api_key")


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, by their declared length or as they arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_within_limit, send)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes} bytes"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="body_too_large")
