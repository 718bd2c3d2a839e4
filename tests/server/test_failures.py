"""A server whose model is not there yet, whose engine is full, fails, or has died."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

from unspool.requests import SamplingParams
from unspool_server.service import Backend, ServedModel
from unspool_server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import RunningApp, ScriptedEngine

BODY = {"model": "tiny", "prompt": "hello"}


def ask(app: RunningApp, **fields: object) -> httpx.Response:
    return httpx.post(f"{app.url}/v1/completions", json={**BODY, **fields})


def assert_unavailable(reply: httpx.Response, code: str) -> None:
    assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "server_error" and reply.json()["error"]["code"] == code


def test_server_is_live_but_not_ready_while_the_model_loads(
    run_app: Callable[[ServerSettings], RunningApp], engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    app = run_app(ServerSettings())
    assert httpx.get(f"{app.url}/health/live").status_code == 200
    for path in ("/health", "/health/ready", "/v1/models"):
        assert_unavailable(httpx.get(f"{app.url}{path}"), "loading")
    assert_unavailable(ask(app), "loading")
    app.service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=1, max_queue=3))
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(f"{app.url}{path}").status_code == httpx.head(f"{app.url}{path}").status_code == 200
    assert ask(app).json()["choices"][0]["text"] == "the quick brown fox"


def test_full_engine_is_503_and_takes_nothing(scripted: RunningApp, engine: ScriptedEngine) -> None:
    engine.full = True
    assert_unavailable(ask(scripted), "server_busy")
    engine.full = False
    assert ask(scripted).status_code == 200


def test_more_prompts_than_there_is_room_for_are_refused_unread(scripted: RunningApp, engine: ScriptedEngine) -> None:
    reply = ask(scripted, prompt=["hello"] * 4)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt"
    assert not engine.submitted
    assert len(ask(scripted, prompt=["hello"] * 3).json()["choices"]) == 3


def test_dead_engine_is_neither_live_nor_ready(scripted: RunningApp, engine: ScriptedEngine) -> None:
    engine.alive = False
    for path in ("/health", "/health/live", "/health/ready", "/v1/models"):
        assert_unavailable(httpx.get(f"{scripted.url}{path}"), "engine_dead")
    assert httpx.head(f"{scripted.url}/health").status_code == 503
    assert_unavailable(ask(scripted), "engine_dead")


def test_failure_of_a_whole_reply_is_500_without_its_cause(scripted: RunningApp, engine: ScriptedEngine) -> None:
    engine.fails_after = 2
    reply = ask(scripted)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text


def test_failure_of_a_stream_is_its_last_frame(scripted: RunningApp, engine: ScriptedEngine) -> None:
    engine.fails_after = 2
    with OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        texts = []
        with pytest.raises(openai.APIError, match="the server failed"):
            for chunk in client.completions.create(**BODY, stream=True):
                texts.append(chunk.choices[0].text)
    assert "the quick brown fox".startswith("".join(texts)) and texts
    frames = ask(scripted, stream=True).text.strip().split("\n\n")
    assert '"error"' in frames[-1] and "[DONE]" not in frames[-1] and "secret" not in frames[-1]


def test_bug_in_the_server_is_an_error_body_with_a_request_id(
    scripted: RunningApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("unspool_server.completions.prepare_completion", fail)
    reply = ask(scripted)
    assert reply.status_code == 500 and reply.headers["x-request-id"]
    assert reply.json()["error"]["type"] == "server_error" and "secret" not in reply.text


def test_model_without_a_template_takes_completions_only(
    run_app: Callable[[ServerSettings], RunningApp],
    engine: ScriptedEngine,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    app = run_app(ServerSettings())
    app.service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=1, max_queue=3))
    messages = [{"role": "user", "content": "hello"}]
    reply = httpx.post(f"{app.url}/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert reply.status_code == 400 and "chat template" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limit", "fields", "param"),
    [
        ({"max_prompt_tokens": 3}, {"prompt": [1, 2, 3, 4]}, "prompt"),
        ({"max_prompts": 1}, {"prompt": ["a", "b"]}, "prompt"),
        ({"max_output_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
        ({}, {"prompt": [1] * 60_000, "echo": True, "logprobs": 20}, "logprobs"),
    ],
)
def test_limits_are_checked_before_the_engine_hears_of_it(
    run_app: Callable[[ServerSettings], RunningApp],
    engine: ScriptedEngine,
    tokenizer: PreTrainedTokenizerFast,
    limit: dict[str, int],
    fields: dict[str, object],
    param: str,
) -> None:
    app = run_app(ServerSettings(**limit))
    app.service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=1, max_queue=3))
    reply = ask(app, **fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert not engine.submitted


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": "x" * 10_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 10_000}]}),
    ],
)
def test_text_that_no_tokens_could_hold_is_refused_unread(
    run_app: Callable[[ServerSettings], RunningApp],
    engine: ScriptedEngine,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    fields: dict[str, object],
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr("unspool_server.completions.encode_prompt", fail)
    monkeypatch.setattr("unspool_server.chat.render_chat", fail)
    app = run_app(ServerSettings(max_prompt_tokens=100))
    app.service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=1, max_queue=3))
    reply = httpx.post(f"{app.url}/v1/{route}", json={"model": "tiny", **fields})
    assert reply.status_code == 400 and reply.json()["error"]["message"].endswith("at most 100 tokens")


def test_models_sampling_settings_fill_what_a_request_leaves_out(
    run_app: Callable[[ServerSettings], RunningApp], engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    app = run_app(ServerSettings())
    model = ServedModel("tiny", tokenizer, frozenset(), {"temperature": 0.5, "top_k": 7})
    app.service.open(Backend(model, engine, max_slots=1, max_queue=3))
    messages = [{"role": "user", "content": "hello"}]
    chat = {"model": "tiny", "messages": messages, "temperature": 0, "top_k": None}
    assert ask(app, top_p=0.9).status_code == 200
    assert httpx.post(f"{app.url}/v1/chat/completions", json=chat).status_code == 200
    assert [request.sampling for request in engine.submitted] == [
        SamplingParams(temperature=0.5, top_k=7, top_p=0.9),
        SamplingParams(temperature=0, top_k=7),
    ]


def test_body_that_does_not_arrive_is_given_up(run_app: Callable[[ServerSettings], RunningApp]) -> None:
    url = httpx.URL(run_app(ServerSettings(body_timeout=1)).url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    assert reply.startswith(b"HTTP/1.1 408 ") and b'"code":"body_timeout"' in reply
