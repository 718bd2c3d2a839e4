"""Who may ask: every route but the health routes needs a key, and no server is opened by accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.routing import Route

from unspool.errors import UserError
from unspool_server.app import create_app
from unspool_server.keys import KeyRing, read_keys
from unspool_server.security import PUBLIC_PATHS
from unspool_server.service import Service
from unspool_server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import RunningApp

KEYED = ServerSettings(api_keys=("first-key", "second-key"))


def all_routes() -> list[tuple[str, str]]:
    """Every method and path that the application answers to, and some that it does not."""
    pending, found = list(create_app(Service(KEYED)).routes), []
    while pending:
        route = pending.pop()
        if isinstance(route, Route):
            found += [(method, route.path) for method in route.methods or ()]
        else:
            pending += route.original_router.routes
    return [*found, ("GET", "/"), ("GET", "/health/"), ("GET", "//health"), ("OPTIONS", "/v1/models"), ("GET", "/nope")]


def test_only_the_health_routes_are_public() -> None:
    paths = {path for _, path in all_routes()}
    assert paths >= {"/v1/models", "/v1/completions", "/v1/chat/completions", "/openapi.json"}
    assert {"/health", "/health/live", "/health/ready"} == PUBLIC_PATHS


def test_every_other_route_needs_a_key(run_app: Callable[[ServerSettings], RunningApp]) -> None:
    app = run_app(KEYED)
    wrong = ["", "Bearer", "Bearer wrong", "Bearer first-key2", "Basic first-key", "first-key", "Bearer FIRST-KEY"]
    with httpx.Client(base_url=app.url) as http:
        for method, path in all_routes():
            for value in wrong:
                reply = http.request(method, path, headers={"Authorization": value})
                if path in PUBLIC_PATHS:
                    assert reply.status_code != 401, (method, path)
                    continue
                assert reply.status_code == 401, (method, path, value)
                assert reply.headers["x-request-id"] and reply.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert reply.json()["error"]["type"] == "authentication_error"


def test_each_key_opens_the_routes(run_app: Callable[[ServerSettings], RunningApp]) -> None:
    app = run_app(KEYED)
    for value in ("Bearer first-key", "bearer second-key"):
        assert httpx.get(f"{app.url}/openapi.json", headers={"Authorization": value}).status_code == 200


def test_openapi_describes_the_bodies() -> None:
    app = create_app(Service(KEYED))
    described = app.openapi()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    properties = described["content"]["application/json"]["schema"]["properties"]
    assert {"messages", "temperature", "top_k"} <= set(properties)


def test_without_a_key_only_requests_to_this_machine_are_answered(
    run_app: Callable[[ServerSettings], RunningApp],
) -> None:
    app = run_app(ServerSettings())
    for host, status in {"localhost": 200, "127.0.0.1:80": 200, "[::1]": 200, "evil.example": 403}.items():
        reply = httpx.get(f"{app.url}/openapi.json", headers={"Host": host})
        assert reply.status_code == status
    assert reply.json()["error"]["code"] == "host_not_allowed" and "www-authenticate" not in reply.headers
    assert httpx.get(f"{app.url}/health/live", headers={"Host": "evil.example"}).status_code == 200


def test_no_reply_invites_other_web_pages(run_app: Callable[[ServerSettings], RunningApp]) -> None:
    app = run_app(ServerSettings())
    reply = httpx.get(f"{app.url}/openapi.json", headers={"Origin": "http://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.example.org"])
def test_reachable_address_needs_a_key_or_consent(host: str) -> None:
    with pytest.raises(ValueError, match="without a key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("k",)).host == host
    assert ServerSettings(host=host, allow_unauthenticated=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerSettings(host=host).on_loopback


def test_keys_come_from_flag_then_file_then_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\nbeta\n")
    environment = {"UNSPOOL_API_KEY": "gamma"}
    assert read_keys(["delta"], None, environment) == ("delta",)
    assert read_keys(None, file, environment) == ("alpha", "beta")
    assert read_keys(None, None, environment) == ("gamma",)
    assert read_keys(None, None, {}) == ()


def test_place_without_a_key_is_an_error(tmp_path: Path) -> None:
    empty, missing = tmp_path / "empty", tmp_path / "missing"
    empty.write_text("# nothing\n")
    for flags, path, environment in [
        (None, empty, {}),
        (None, missing, {}),
        (None, None, {"UNSPOOL_API_KEY": ""}),
        ([""], None, {}),
        (["a\nb"], None, {}),
    ]:
        with pytest.raises(UserError):
            read_keys(flags, path, environment)


def test_keys_are_not_shown() -> None:
    assert "first-key" not in repr(KEYED)
    assert "first-key" not in str(vars(KeyRing(KEYED.api_keys)))
