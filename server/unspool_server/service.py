"""What the routes serve: nothing while the model loads, then one model behind one engine."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar, TypeVarTuple

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from unspool.requests import EngineDead
from unspool_server.errors import ApiError, unavailable
from unspool_server.generations import GenerationEngine, Generations
from unspool_server.settings import ServerSettings
from unspool_server.vocabulary import Vocabulary

PREPARING_THREADS = 2

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedModel:
    """A model's name in the API, its tokenizer, the tokens that end its texts, and how it wants to be sampled."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)


class Backend:
    """A model that is ready to be asked. Its engine runs `max_slots` generations and lets `max_queue` wait."""

    def __init__(self, model: ServedModel, engine: GenerationEngine, max_slots: int, max_queue: int) -> None:
        self.model = model
        self.engine = engine
        self.generations = Generations(engine, max_slots, max_queue)
        self.vocabulary = Vocabulary(model.tokenizer)
        self.created = int(time.time())


class Service:
    """Holds the backend once there is one. `open` may be called from any thread."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.died = False
        """Whether the engine had stopped before it was told to."""
        self._backend: Backend | None = None
        self._ended = False
        self._changing = threading.Lock()
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="unspool-prepare")

    def open(self, backend: Backend) -> bool:
        """Whether `backend` is served from now on; its engine is ended instead if everything has ended already."""
        with self._changing:
            if self._ended:
                backend.engine.shutdown()
                return False
            self._backend = backend
            return True

    async def prepare(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Runs what grows with a request's size, on threads of its own: the loop's are for answers under way."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *arguments)

    def close(self) -> None:
        """Ends everything. Nothing may be asked for afterwards."""
        self.shutdown()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def shutdown(self) -> None:
        """Ends the engine; whatever is in flight is cancelled."""
        with self._changing:
            if self._ended:
                return
            self._ended = True
            self.died = self.failed
            if self._backend is not None:
                self._backend.engine.shutdown()

    @property
    def failed(self) -> bool:
        """Whether there was an engine and it has stopped."""
        return self._backend is not None and not self._backend.engine.alive

    def ready_backend(self) -> Backend:
        """Raises ApiError (503) while the model loads, EngineDead when the engine has stopped."""
        if self._backend is None:
            raise unavailable("the model is loading; try again later", "loading")
        if self.failed:
            raise EngineDead("the engine has stopped")
        return self._backend

    def backend_of(self, model: str) -> Backend:
        """The backend that serves `model`. Raises ApiError (404) when that is another."""
        backend = self.ready_backend()
        if model != backend.model.name:
            message = "model: there is no such model; GET /v1/models lists what is served"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
        return backend


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
