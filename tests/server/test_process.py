"""The server as a process: how it starts, ends, and frees what a client that leaves was using."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from unspool import UnspoolForCausalLM
from unspool_server.service import Backend, ServedModel, Service
from unspool_server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import ScriptedEngine, ServerProcess

Launch = Callable[..., AbstractContextManager["ServerProcess"]]
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 1_000_000, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def one_slot(launch: Launch, checkpoint: Path) -> Iterator[ServerProcess]:
    """A server on which a generation that goes on would keep all others waiting."""
    with launch(
        str(checkpoint),
        "--max-slots",
        "1",
        "--max-queue",
        "3",
        "--max-output-tokens",
        "1000000",
        "--max-connections",
        "16",
    ) as server:
        server.wait_until_ready()
        yield server


def seconds_of_a_short_request(server: ServerProcess) -> float:
    started = time.monotonic()
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    return time.monotonic() - started


def test_client_that_leaves_a_stream_frees_its_slot(one_slot: ServerProcess) -> None:
    for _ in range(5):
        with httpx.stream("POST", f"{one_slot.url}/v1/completions", json={**LONG, "stream": True}) as reply:
            next(reply.iter_bytes())
        assert seconds_of_a_short_request(one_slot) < 5


def test_client_that_leaves_a_whole_reply_frees_its_slot(one_slot: ServerProcess) -> None:
    for _ in range(5):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{one_slot.url}/v1/completions", json=LONG, timeout=0.3)
        assert seconds_of_a_short_request(one_slot) < 5


def test_stop_string_frees_the_slot_of_a_long_request(one_slot: ServerProcess) -> None:
    letters = list("etaoinsrh lud")
    reply = httpx.post(f"{one_slot.url}/v1/completions", json={**LONG, "stop": letters}, timeout=60)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert seconds_of_a_short_request(one_slot) < 5


def test_clients_that_leave_the_queue_give_up_their_place(one_slot: ServerProcess) -> None:
    def leave(_: int) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{one_slot.url}/v1/completions", json=LONG, timeout=0.5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(leave, range(12)))
    assert seconds_of_a_short_request(one_slot) < 5


def test_request_beyond_the_queue_is_told_to_come_back(one_slot: ServerProcess) -> None:
    body = {**LONG, "prompt": ["hello"] * 3, "stream": True}
    with httpx.stream("POST", f"{one_slot.url}/v1/completions", json=body) as reply:
        content = reply.iter_bytes()  # dropping it would close the connection
        next(content)
        refused = httpx.post(f"{one_slot.url}/v1/completions", json={**SHORT, "prompt": ["hello"] * 2})
        assert refused.status_code == 503 and refused.headers["retry-after"]
    assert seconds_of_a_short_request(one_slot) < 5


def test_connection_beyond_the_limit_is_refused(one_slot: ServerProcess) -> None:
    url = httpx.URL(one_slot.url)
    with contextlib.ExitStack() as idle:
        for _ in range(16):
            idle.enter_context(socket.create_connection((url.host, url.port)))
        assert httpx.get(f"{one_slot.url}/health").status_code == 503
    one_slot.wait_for(lambda: httpx.get(f"{one_slot.url}/health").status_code == 200, seconds=10)


def test_sigterm_lets_answers_finish_and_exits_with_zero(launch: Launch, checkpoint: Path) -> None:
    with launch(str(checkpoint)) as server:
        server.wait_until_ready()
        body = {**LONG, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
            content = reply.iter_text()
            text = next(content)
            server.process.send_signal(signal.SIGTERM)
            text += "".join(content)
        assert text.endswith("data: [DONE]\n\n") and text.count("data: ") > 100
        assert server.process.wait(20) == 0


def test_sigterm_ends_an_answer_without_end_by_an_error(launch: Launch, checkpoint: Path) -> None:
    arguments = ("--max-output-tokens", "1000000", "--shutdown-timeout", "1")
    with launch(str(checkpoint), *arguments) as server:
        server.wait_until_ready()
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as reply:
            content = reply.iter_bytes()
            text = next(content)
            server.process.send_signal(signal.SIGTERM)
            text += b"".join(content)
        assert b"shutting down" in text.strip().split(b"\n")[-1]
        assert server.process.wait(20) == 0
    assert "Traceback" not in "".join(server.log)


def test_second_interrupt_ends_answers_by_an_error_and_waits_for_nobody(launch: Launch, checkpoint: Path) -> None:
    with launch(str(checkpoint), "--max-output-tokens", "1000000") as server:
        server.wait_until_ready()
        url = httpx.URL(server.url)
        with (
            socket.create_connection((url.host, url.port)) as silent,
            httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as reply,
        ):
            silent.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            )
            content = reply.iter_bytes()
            text = next(content)
            server.process.send_signal(signal.SIGINT)
            text += next(content)
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            text += b"".join(content)
            assert b"shutting down" in text.strip().split(b"\n")[-1]
            assert server.process.wait(15) == 130
    assert "Traceback" not in "".join(server.log)


def test_models_sampling_settings_are_the_servers(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    model = copy_with_sampling(checkpoint, tmp_path / "tiny", temperature=0.01, top_k=1)
    with launch(str(model)) as server:
        server.wait_until_ready()
        with server.client() as client:
            texts = {client.completions.create(model="tiny", prompt="hello", max_tokens=32).choices[0].text}
            greedy = client.completions.create(model="tiny", prompt="hello", max_tokens=32, temperature=0)
    assert texts == {greedy.choices[0].text}


def copy_with_sampling(checkpoint: Path, path: Path, **values: float) -> Path:
    shutil.copytree(checkpoint, path)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, **values}))
    return path


@pytest.fixture(scope="module")
def deep_checkpoint(
    model: UnspoolForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of so many layers that a process is busy for a second or more when it loads them."""
    config = copy.deepcopy(model.config)
    config.layer_types, config.num_hidden_layers = config.layer_types * 100, 200
    path = tmp_path_factory.mktemp("checkpoints") / "deep"
    UnspoolForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("number", "code", "delay"),
    [
        *((signal.SIGTERM, 0, delay) for delay in (0.0, 0.02, 0.3, 0.6, 0.9)),
        *((signal.SIGINT, 130, delay) for delay in (0.0, 0.5)),
    ],
)
def test_signal_before_the_model_is_loaded_ends_the_process(
    launch: Launch, deep_checkpoint: Path, number: signal.Signals, code: int, delay: float
) -> None:
    """Before there is an event loop, as it starts, and while a thread is anywhere in PyTorch."""
    with launch(str(deep_checkpoint)) as server:
        while not any("listening on" in line for line in server.log):  # the first moments are over within one poll
            assert server.process.poll() is None, "".join(server.log)
            time.sleep(0.0005)
        time.sleep(delay)
        server.process.send_signal(number)
        assert server.process.wait(60) == code, "".join(server.log)
    assert "Traceback" not in "".join(server.log)
    assert not any("serving deep" in line for line in server.log)


def test_model_that_is_loaded_after_the_end_is_ended_too(
    tokenizer: PreTrainedTokenizerFast, engine: ScriptedEngine
) -> None:
    service = Service(ServerSettings())
    service.close()
    assert not service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=1, max_queue=3))
    assert not engine.alive
    assert not service.died


def test_key_of_the_environment_guards_the_process(launch: Launch, checkpoint: Path) -> None:
    environment = {"UNSPOOL_API_KEY": "the-key"}
    with launch(str(checkpoint), "--served-model-name", "house/model", environment=environment) as server:
        server.wait_until_ready()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        with server.client("the-key") as client:
            assert client.models.retrieve("house/model").id == "house/model"
        assert "the-key" not in "".join(server.log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{checkpoint}", "--host", "0.0.0.0"], "without a key"),
        (["{checkpoint}", "--max-output-tokens", "0"], "max_output_tokens"),
        (["{checkpoint}", "--host", "256.0.0.1", "--api-key", "k"], "cannot listen"),
        (["{checkpoint}", "--host", "a..b", "--api-key", "k"], "cannot listen"),
        (["{checkpoint}", "--max-slots", "1" + "0" * 15], "max_slots"),
        (["{checkpoint}", "--device", "nonsense"], "device"),
        (["{nowhere}"], "not a directory"),
    ],
)
def test_what_cannot_be_served_ends_with_one_line(
    launch: Launch, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(checkpoint=checkpoint, nowhere=tmp_path / "none") for argument in arguments]
    with launch(*filled) as server:
        assert server.process.wait(60) == 2
    errors = [line for line in server.log if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in "".join(server.log)
