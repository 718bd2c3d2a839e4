"""The verb `serve`: flags and keys in, an exit code out. Loads the model while the server already tells its health."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from transformers import PreTrainedTokenizerBase

from unspool.cli import INTERRUPTED
from unspool.engine import Engine, EngineOptions
from unspool.errors import UserError
from unspool.executor import Executor
from unspool.flags import add_flags, from_flags
from unspool.local import LocalOptions, open_executor
from unspool_server.app import create_app
from unspool_server.keys import read_keys
from unspool_server.schemas import SAMPLING_DEFAULTS
from unspool_server.service import Backend, ServedModel, Service
from unspool_server.settings import ServerSettings

# For telling clients that the time is up, before their connections are broken off.
LAST_WORDS_SECONDS = 5
POLL_SECONDS = 0.1

logger = logging.getLogger("uvicorn.error")


def add_serve(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments, and returns what runs it until SIGTERM or SIGINT."""
    parser.add_argument("model", metavar="DST", type=Path, help="directory that `unspool convert` wrote")
    parser.epilog = SAMPLING_DEFAULTS
    add_flags(parser.add_argument_group("server"), ServerSettings)
    keys = parser.add_argument_group(
        "keys", "Without a flag the key is taken from UNSPOOL_API_KEY. Flags can be read in the list of processes."
    ).add_mutually_exclusive_group()
    keys.add_argument("--api-key", action="append", metavar="KEY", help="a key that opens the server; may be repeated")
    keys.add_argument("--api-key-file", type=Path, metavar="PATH", help="file with one key a line")
    add_flags(parser.add_argument_group("engine"), EngineOptions)
    add_flags(parser.add_argument_group("hardware"), LocalOptions)
    return run_serve


def run_serve(args: argparse.Namespace) -> int:
    api_keys = read_keys(args.api_key, args.api_key_file, os.environ)
    settings = from_flags(args, ServerSettings, api_keys=api_keys)
    start = ModelStart(
        args.model, settings.served_model_name, from_flags(args, EngineOptions), from_flags(args, LocalOptions)
    )
    return serve(settings, start)


@dataclass(frozen=True)
class ModelStart:
    """Which model to start an engine on, and how."""

    path: Path
    name: str | None
    engine: EngineOptions
    hardware: LocalOptions

    def __call__(self) -> Backend:
        """Loads the model and starts its engine.

        Raises UserError when the directory holds no sound converted model, or there is no memory for the slots.
        """
        loaded, executor = open_executor(self.path, self.hardware)
        engine = self._make_engine(executor, loaded.tokenizer)
        engine.start()
        served = ServedModel(self.name or loaded.name, loaded.tokenizer, loaded.eos_ids, loaded.sampling_defaults)
        return Backend(served, engine, engine.num_slots, self.engine.max_queue)

    def _make_engine(self, executor: Executor, tokenizer: PreTrainedTokenizerBase) -> Engine:
        try:
            return Engine(executor, self.engine, tokenizer)
        except (RuntimeError, MemoryError) as error:  # PyTorch raises RuntimeError when it gets no memory
            slots, reason = self.engine.max_slots, (str(error).splitlines() or ["out of memory"])[0]
            raise UserError(f"cannot hold {slots} slots: {reason}; pass a smaller --max-slots") from error


class GracefulServer(uvicorn.Server):
    """Lets answers finish after a signal; those that take too long are ended with an error that says why.

    A second signal ends them so at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.interrupted = False
        """Whether it was SIGINT that came first."""
        self._service = service
        self._in_haste = False

    def take_signals(self) -> None:
        """Makes the signals that end a server end this one, also before it runs and when it has ended."""
        # uvicorn takes them only once its event loop runs; then it puts these handlers back and raises the signals
        # that it got again, which must not be what ends the process.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self.interrupted = sig == signal.SIGINT
        elif not self._in_haste:
            self._in_haste = True
            return
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut_off = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            cut_off.cancel()

    async def _cut_off(self) -> None:
        deadline = time.monotonic() + self._service.settings.shutdown_timeout
        while not self._in_haste and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self._service.shutdown)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        # Who is still here does not read, or does not send: to its request this is a client that has left.
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Startup(threading.Thread):
    """Starts the backend beside the running server, and stops the server if that fails."""

    def __init__(self, start: Callable[[], Backend], service: Service, server: uvicorn.Server) -> None:
        super().__init__(name="unspool-startup", daemon=True)
        self.failure: Exception | None = None
        self._start = start
        self._service = service
        self._server = server

    def run(self) -> None:
        try:
            backend = self._start()
        except Exception as error:  # it is raised again by whoever joins
            self.failure = error
            self._server.should_exit = True
            return
        if self._service.open(backend):
            logger.info("serving %s", backend.model.name)


def serve(settings: ServerSettings, start: Callable[[], Backend]) -> int:
    """Serves until a signal ends it, then lets answers in flight finish. Returns 1 if the engine died, else 0.

    Ends the process itself if `start` is still running then. Raises UserError when the address cannot be listened on,
    KeyboardInterrupt if the signal was SIGINT, and whatever `start` raises.
    """
    listener = _listen(settings)
    service = Service(settings)
    server = GracefulServer(_uvicorn_config(service, settings), service)
    startup = Startup(start, service, server)
    server.take_signals()
    startup.start()
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server.run([listener])
    service.close()  # uvicorn does not let the application do it when a third signal comes
    if startup.is_alive():
        _end_process(INTERRUPTED if server.interrupted else 0)
    if startup.failure is not None:
        raise startup.failure
    if server.interrupted:
        raise KeyboardInterrupt
    return 1 if service.died else 0


def _end_process(code: int) -> NoReturn:
    """Ends the process beside a thread that loads a model.

    Nothing can stop that thread, and the interpreter, when it ends itself, breaks it off inside PyTorch: that aborts.
    """
    logging.shutdown()
    os._exit(code)


def _listen(settings: ServerSettings) -> socket.socket:
    """A bound socket, so that a taken port is known before a model is loaded for it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no host name"
        raise UserError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from error


def _uvicorn_config(service: Service, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        ws="none",
        log_level=settings.log_level,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections + 1,  # uvicorn refuses the one that reaches its limit
        timeout_graceful_shutdown=settings.shutdown_timeout + 2 * LAST_WORDS_SECONDS,
    )
