"""What the server refuses, and how it says so: OpenAI's error body, the field's name, never the value."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from conftest import ServerProcess

SECRET = "a-value-that-must-not-come-back"
MESSAGES = [{"role": "user", "content": "hello"}]

BAD_COMPLETIONS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", []),
    ("prompt", [SECRET, 1]),
    ("prompt", [[]]),
    ("prompt", ["a", [1]]),
    ("prompt", [[1], "a"]),
    ("prompt", [-1]),
    ("prompt", [320]),
    ("prompt", [1.5]),
    ("prompt", "\ud800"),
    ("prompt", [SECRET] * 129),
    ("max_tokens", -1),
    ("max_tokens", SECRET),
    ("max_tokens", True),
    ("max_tokens", 0),
    ("max_tokens", 10**9),
    ("n", 2),
    ("best_of", 3),
    ("suffix", SECRET),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("stop", ["x"] * 17),
    ("stop", "x" * 257),
    ("stop", ""),
    ("stop", [1]),
    ("temperature", -0.1),
    ("temperature", SECRET),
    ("temperature", 1e400),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("seed", 1 << 64),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
    ("logit_bias", {SECRET: 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"100000": 1}),
    ("logit_bias", {"1": None}),
    ("logit_bias", {"1": 10**400}),
    ("logit_bias", {"1": -(10**400)}),
    ("temperature", 10**400),
    ("seed", 10**400),
    ("stop_token_ids", [0] * 129),
    ("min_tokens", 1_000_000),
    ("stream", "yes"),
    ("stream_options.unknown", {"unknown": 1}),
    ("stream_options", {"include_usage": True}),
    ("guided_json", {}),
]

BAD_CHATS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", SECRET),
    ("messages[0].role", [{"role": SECRET, "content": "x"}]),
    ("messages[0].role", [{"role": "tool", "content": "x"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": None}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
    ("messages[0].weight", [{"role": "user", "content": "x", "weight": 1}]),
    ("messages", [{"role": "user", "content": "x"}] * 4097),
    ("tools", [{"type": "function", "function": {"name": SECRET}}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}),
    ("n", 2),
    ("audio", {"voice": SECRET}),
    ("modalities", ["audio"]),
    ("reasoning_effort", "high"),
    ("store", True),
    ("top_logprobs", 2),
    ("max_completion_tokens", 0),
    ("web_search_options", {}),
    ("logprobs", 1),
    ("echo", True),
]


def assert_refused(reply: httpx.Response, param: str | None, status: int = 400) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param, error
    assert SECRET not in reply.text and len(reply.content) < 1000


def names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{name}={str(value)[:20]}" for name, value in cases]


@pytest.mark.parametrize(("param", "value"), BAD_COMPLETIONS, ids=names(BAD_COMPLETIONS))
def test_completion_refuses_by_field(http: httpx.Client, param: str, value: Any) -> None:
    body = {"model": "tiny", "prompt": "hello", param.split(".")[0]: value}
    content = json.dumps(body, allow_nan=True).replace("Infinity", "1e400")
    reply = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert_refused(reply, param)


@pytest.mark.parametrize(("param", "value"), BAD_CHATS, ids=names(BAD_CHATS))
def test_chat_refuses_by_field(http: httpx.Client, param: str, value: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, param.split("[")[0]: value}
    assert_refused(http.post("/v1/chat/completions", json=body), param)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b'{"model": "\xff"}',
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 33 + b"]" * 33 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join(b'"k%d":0' % index for index in range(100_000)) + b"}",
    ],
    ids=lambda content: str(content[:24]),
)
def test_what_is_no_fitting_json_is_refused(http: httpx.Client, route: str, content: bytes) -> None:
    reply = http.post(route, content=content, headers={"Content-Type": "application/json"})
    assert_refused(reply, None)


def test_many_errors_give_a_short_reply(http: httpx.Client) -> None:
    bad = [{"role": SECRET, "content": 1, "unknown": SECRET}] * 4000
    body = {"model": "tiny", "messages": bad, **{f"field{index}": 1 for index in range(2000)}}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400 and len(reply.content) < 1000


def test_unknown_field_with_a_hostile_name_is_not_played_back(http: httpx.Client) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "\x1b[31m\ud800" + "y" * 5000: 1})
    reply = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and len(reply.content) < 1000 and b"\x1b" not in reply.content


def test_body_must_be_declared_as_json(http: httpx.Client) -> None:
    body = b'{"model": "tiny", "prompt": "x"}'
    reply = http.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"})
    assert_refused(reply, None, 415)


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 65536):
        yield b" " * 65536


def test_body_over_the_limit_is_refused_with_or_without_a_length(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    size = (8 << 20) + 65536
    declared = http.post("/v1/completions", content=b" " * size, headers=headers)
    assert_refused(declared, None, 413)
    chunked = http.post("/v1/completions", content=chunks(size), headers=headers)
    assert_refused(chunked, None, 413)
    assert http.get("/v1/models").status_code == 200


def test_unknown_addresses_and_methods_have_the_same_error_body(http: httpx.Client) -> None:
    assert_refused(http.get("/v1/nothing"), None, 404)
    assert_refused(http.get("/docs"), None, 404)
    wrong_method = http.put("/v1/completions")
    assert_refused(wrong_method, None, 405)
    assert wrong_method.headers["allow"] == "POST"


def test_messages_show_json_as_it_is_sent(http: httpx.Client) -> None:
    def message(**fields: Any) -> str:
        reply = http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **fields})
        return str(reply.json()["error"]["message"])

    parts = [{"role": "user", "content": [{"type": "image_url"}]}]
    assert message(messages=parts).endswith('are implemented: {"type": "text", "text": string}')
    assert message(response_format=1).endswith('send null or {"type": "text"}')
    assert message(store=True).endswith("send null or false")


def test_client_that_leaves_while_sending_is_no_failure(server: ServerProcess, http: httpx.Client) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert http.get("/v1/models").status_code == 200
    time.sleep(0.5)  # for a line in the log that must not come
    assert "a request failed" not in "".join(server.log)


def test_another_model_is_not_found(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"model": SECRET, "prompt": "x"})
    assert_refused(reply, "model", 404)
    assert reply.json()["error"]["code"] == "model_not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name.split(".")[0].split("[")[0] for name, _ in BAD_COMPLETIONS + BAD_CHATS})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), chat=st.booleans())
def test_no_body_makes_the_server_fail(http: httpx.Client, body: dict[str, Any], chat: bool) -> None:
    route, prompt = ("chat/completions", {"messages": MESSAGES}) if chat else ("completions", {"prompt": "hello"})
    reply = http.post(f"/v1/{route}", json={"model": "tiny", "max_tokens": 1, **prompt, **body})
    assert reply.status_code in (200, 400), reply.text
