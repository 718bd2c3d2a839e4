"""A tiny random converted model on disk, real server processes on it, and an app on an engine that follows a script."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unspool import MixerSpec, UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.requests import EngineBusy, EngineDead, EventSink, FinishEvent, GenerationRequest, TokenEvent
from unspool_server.app import create_app
from unspool_server.service import Backend, ServedModel, Service
from unspool_server.settings import ServerSettings

MODEL = "tiny"
EOS, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "a thread of any length, drawn from a spool", "Grüße an café"]

LAUNCH = """
import argparse, sys
from unspool.errors import UserError
from unspool_server.cli import add_serve
parser = argparse.ArgumentParser()
run = add_serve(parser)
try:
    sys.exit(run(parser.parse_args()))
except UserError as error:
    sys.stderr.write(f"error: {error}")
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS, "<|system|>", USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> UnspoolForCausalLM:
    torch.manual_seed(0)
    config = UnspoolConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        linearize=linearize_block("disjoint", MixerSpec(window=8, sinks=2), {}),
    )
    return UnspoolForCausalLM(config).eval()


@pytest.fixture(scope="session")
def checkpoint(
    model: UnspoolForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / MODEL
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class ServerProcess:
    """A running `unspool serve`. `log` grows as it writes."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    url: str = ""

    def follow(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.05)

    def wait_until_listening(self) -> None:
        def listening() -> bool:
            found = re.search(r"listening on (http://\S+)", "".join(self.log))
            self.url = found[1] if found else ""
            return found is not None

        self.wait_for(listening)

    def wait_until_ready(self) -> None:
        self.wait_until_listening()

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health/ready").status_code == 200
            return False

        self.wait_for(ready)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextlib.contextmanager
def launched(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Starts `unspool serve` with these arguments on a free port, and kills it in the end if it is still there."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    inherited = {name: value for name, value in os.environ.items() if name != "UNSPOOL_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments, "--port", "0", "--threads", "1"],
        env={**inherited, "PYTHONPATH": path, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    server = ServerProcess(process)
    follower = threading.Thread(target=server.follow)
    follower.start()
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        follower.join()


@pytest.fixture(scope="session")
def launch() -> Callable[..., contextlib.AbstractContextManager[ServerProcess]]:
    return launched


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    """One real server for the tests that only ask it questions."""
    with launched(str(checkpoint), "--max-slots", "4") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


class ScriptedEngine:
    """An engine that answers every request with the same tokens, and fails when and how it is told to."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.alive = True
        self.full = False
        self.fails_after: int | None = None
        self.submitted: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        if not self.alive:
            raise EngineDead("stopped")
        if self.full:
            raise EngineBusy("full")
        self.submitted.append(request)
        produced = self.tokens[: self.fails_after]
        for token in produced:
            sink(TokenEvent(request.request_id, token, None))
        failed = self.fails_after is not None
        reason = "error" if failed else "length"
        sink(FinishEvent(request.request_id, reason, len(request.prompt), len(produced), "secret detail"))

    def cancel(self, request_id: str) -> None:
        """Requests are finished as soon as they are submitted."""

    def shutdown(self) -> None:
        self.alive = False


@dataclass
class RunningApp:
    service: Service
    url: str


@pytest.fixture
def run_app() -> Iterator[Callable[[ServerSettings], RunningApp]]:
    """Runs the application in this process, on a real socket, with no model until one is opened."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def run(settings: ServerSettings) -> RunningApp:
        service = Service(settings)
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", ws="none"))
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        servers.append((server, thread))
        return RunningApp(service, f"http://127.0.0.1:{listener.getsockname()[1]}")

    yield run
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> ScriptedEngine:
    return ScriptedEngine(tokenizer.encode("the quick brown fox"))


@pytest.fixture
def scripted(
    run_app: Callable[[ServerSettings], RunningApp], tokenizer: PreTrainedTokenizerFast, engine: ScriptedEngine
) -> RunningApp:
    """An app whose model is `engine`."""
    app = run_app(ServerSettings())
    app.service.open(
        Backend(ServedModel(MODEL, tokenizer, frozenset({tokenizer.eos_token_id})), engine, max_slots=1, max_queue=3)
    )
    return app
