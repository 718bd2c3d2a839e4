"""A model in this process, for notebooks and scripts: no server needed."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import Self, TypeVar, Unpack

import torch
from transformers import PreTrainedTokenizerBase

from unspool.engine import Engine
from unspool.executor import make_executor
from unspool.llm.admission import Admission
from unspool.llm.chat_turns import ChatTurns
from unspool.llm.generation import (
    Conversation,
    Generation,
    Preparer,
    Prompt,
    as_conversations,
    as_prompts,
    is_conversation,
)
from unspool.llm.options import LLMArguments, read_options
from unspool.llm.outputs import RequestOutput
from unspool.llm.params import SamplingParams
from unspool.llm.run import async_events, events
from unspool.llm.sample import StreamPiece
from unspool.llm.session import Session, SessionHost
from unspool.local import computed_format, load_for
from unspool.requests import EngineDead, GenerationRequest, InvalidRequest
from unspool.sessions import SessionExists, SessionInfo, Sessions
from unspool.store import identity_of, open_store

Params = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one for each. None is what the model's own generation_config.json asks for."""

Item = TypeVar("Item")


class LLM:
    """A converted model and its engine. Names are vLLM's.

        with LLM("model-dir", quant="int8", store="sessions") as llm:
            llm.generate(["Once upon", "The end"], SamplingParams(max_tokens=40))[0].outputs[0].text
            llm.chat([{"role": "user", "content": "Hello"}])[0].outputs[0].text
            llm.session("diary").say("Hello again").text

    Thread-safe. What a request gets does not depend on what else runs. `close` it, or use it as a context manager.
    Sessions and their store are opened with the first session; that reads the model's files once, so that no state is
    ever used under other weights.
    """

    def __init__(self, model: str | Path, **options: Unpack[LLMArguments]) -> None:
        """Loads a directory that `unspool convert` wrote, and starts its engine.

        Raises UserError as `load` and `make_executor` do, InvalidRequest for an option out of range.
        """
        self._options = read_options(options)
        self._loaded, local = load_for(model, self._options.local)
        self._state_dtype = getattr(torch, local.state_dtype)
        self._weight_format = computed_format(self._loaded, local)
        executor = make_executor(self._loaded.model, local)
        self._config = executor.config
        self._engine = Engine(executor, self._options.engine, self._loaded.tokenizer)
        self._admission = Admission(self._options.engine.max_queue)
        self._preparer = Preparer(self._loaded, self._engine.vocab_size, self._options.store.owner)
        self._host: SessionHost | None = None
        self._closed = False
        self._changing = threading.Lock()
        self._engine.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded.tokenizer

    @property
    def engine(self) -> Engine:
        """For its statistics."""
        return self._engine

    @property
    def default_params(self) -> SamplingParams:
        """What is used where none are given: from the model's generation_config.json, if that asks for sampling."""
        return SamplingParams(**self._loaded.sampling_defaults)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """Continues texts, or token ids; as many as there are, in any number.

        Raises InvalidRequest, naming the field, before anything is generated, and EngineDead.
        """
        return self._complete(self._continued(prompts, params))

    def chat(self, messages: Conversation | Sequence[Conversation], params: Params = None) -> list[RequestOutput]:
        """Answers one conversation, or each of several. Raises UserError when the model has no chat template."""
        return self._complete(self._answered(messages, params))

    async def agenerate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """`generate` on an event loop; cancelling the task frees what it holds."""
        return await self._complete_async(await asyncio.to_thread(self._continued, prompts, params))

    async def achat(
        self, messages: Conversation | Sequence[Conversation], params: Params = None
    ) -> list[RequestOutput]:
        """`chat` on an event loop."""
        return await self._complete_async(await asyncio.to_thread(self._answered, messages, params))

    async def stream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None
    ) -> AsyncGenerator[StreamPiece, None]:
        """Pieces of the text that continues one prompt, or answers a conversation; of `n` samples as they come.
        Leaving early, or cancelling the task, frees what it holds."""
        generation = await asyncio.to_thread(self._streamed, prompt, params)
        async with contextlib.aclosing(async_events(self._engine, self._admission, generation.requests)) as arriving:
            async for event in arriving:
                if piece := generation.take(event, self._preparer.token_text):
                    yield piece

    def stream_sync(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None
    ) -> Generator[StreamPiece, None, None]:
        """The same without an event loop."""
        generation = self._streamed(prompt, params)
        with contextlib.closing(events(self._engine, self._admission, generation.requests)) as arriving:
            for event in arriving:
                if piece := generation.take(event, self._preparer.token_text):
                    yield piece

    def session(self, id: str | None = None) -> Session:
        """The session of that id, which is made if there is none; without an id a new one."""
        host = self._session_host()
        try:
            return Session(host, host.sessions.create(host.owner, id).id)
        except SessionExists:
            assert id is not None, "a new id is nobody's"
            return Session(host, host.sessions.info(host.owner, id).id)

    def list_sessions(self, *, after: str = "", limit: int = 100) -> list[SessionInfo]:
        """Sessions by id, at most `limit` of those after the id `after`."""
        host = self._session_host()
        return host.sessions.list(host.owner, after=after, limit=limit)

    def close(self) -> None:
        """Cancels what is in flight and stores the states of all committed turns. Closing twice is fine."""
        with self._changing:
            self._closed = True
            host, self._host = self._host, None
        self._engine.shutdown()
        if host is not None:
            host.sessions.close()
            host.sessions.store.close()

    def _session_host(self) -> SessionHost:
        with self._changing:
            if self._closed:
                raise EngineDead("the LLM was closed; open it again")
            if self._host is None:
                self._host = self._open_sessions()
            return self._host

    def _open_sessions(self) -> SessionHost:
        options, path = self._options, self._loaded.path
        identity = identity_of(path, self._config, weight_format=self._weight_format, state_dtype=self._state_dtype)
        wanted = options.store
        store = open_store(
            os.fspath(wanted.store),
            max_bytes=wanted.store_bytes,
            cache_directory=Path(wanted.store_cache) if wanted.store_cache is not None else None,
            cache_bytes=wanted.store_cache_bytes,
        )
        return SessionHost(
            Sessions(self._engine, store, identity, options.sessions),
            self._preparer,
            ChatTurns(self.tokenizer, self._loaded.eos_ids),
            self._admission,
            options.store.owner,
            self.default_params,
        )

    def _continued(self, prompts: Prompt | Sequence[Prompt], params: Params) -> list[Generation]:
        several = as_prompts(prompts)
        each = self._each_params(several, params)
        return [
            self._preparer.prompt(prompt, one, f"prompts[{index}]")
            for index, (prompt, one) in enumerate(zip(several, each, strict=True))
        ]

    def _answered(self, messages: Conversation | Sequence[Conversation], params: Params) -> list[Generation]:
        several = as_conversations(messages)
        each = self._each_params(several, params)
        return [self._preparer.chat(conversation, one) for conversation, one in zip(several, each, strict=True)]

    def _streamed(self, prompt: Prompt | Conversation, params: SamplingParams | None) -> Generation:
        params = params or self.default_params
        if params.ranks_samples:
            raise InvalidRequest("best_of", "which samples are best is known at the end only: use generate")
        make: Callable[..., Generation] = self._preparer.chat if is_conversation(prompt) else self._preparer.prompt
        return make(prompt, params)

    def _each_params(self, items: Sequence[object], params: Params) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * len(items)
        if len(params) != len(items):
            raise InvalidRequest("params", f"must be one for all, or {len(items)}, one for each")
        return params

    def _complete(self, generations: list[Generation]) -> list[RequestOutput]:
        owners, requests = _by_request(generations)
        with contextlib.closing(events(self._engine, self._admission, requests)) as arriving:
            for event in arriving:
                owners[event.request_id].take(event, self._preparer.token_text)
        return [generation.output() for generation in generations]

    async def _complete_async(self, generations: list[Generation]) -> list[RequestOutput]:
        owners, requests = _by_request(generations)
        async with contextlib.aclosing(async_events(self._engine, self._admission, requests)) as arriving:
            async for event in arriving:
                owners[event.request_id].take(event, self._preparer.token_text)
        return [generation.output() for generation in generations]


def _by_request(generations: list[Generation]) -> tuple[dict[str, Generation], list[GenerationRequest]]:
    """Which generation each request belongs to, and all requests in order."""
    requests = [request for generation in generations for request in generation.requests]
    owners = {request.request_id: generation for generation in generations for request in generation.requests}
    return owners, requests
