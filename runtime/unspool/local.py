"""An engine in this process, and text from it: what the command-line verbs share. Writes nothing itself."""

import argparse
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

import torch

from unspool.engine import Engine, EngineOptions
from unspool.errors import UserError
from unspool.executor import Executor, ExecutorOptions, choose_backend, make_executor
from unspool.flags import add_flags, from_flags
from unspool.loading import LoadedModel, load
from unspool.quantization import BITS, PACKED_FORMATS
from unspool.requests import EngineDead, EngineEvent, FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from unspool.text import TextStream

logger = logging.getLogger(__name__)

REQUEST_ID = "local"


@dataclass(frozen=True, kw_only=True)
class LocalOptions(ExecutorOptions):
    """Where and how the model runs."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "number format of the weights; auto keeps the checkpoint's"}
    )
    device: str = field(default="cpu", metadata={"help": "where to run, such as cpu or cuda"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's own choice if not given"})

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError("threads: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A prompt's tokens and how to continue them as text. `mid_text`: the answer goes on where the prompt ends, rather
    than being a text of its own, so a space at its beginning counts."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    stop: Sequence[str] = ()
    mid_text: bool = False


@dataclass(frozen=True)
class GenerationSummary:
    """What a finished generation came to. `prompt_seconds` lasts until the first token."""

    finish_reason: Literal["stop", "length", "cancelled", "expired"]
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    prompt_seconds: float

    def __str__(self) -> str:
        decode_seconds = self.seconds - self.prompt_seconds
        rate = f", {(self.generated_tokens - 1) / decode_seconds:.1f} tokens/s" if self.generated_tokens > 1 else ""
        return (
            f"{self.prompt_tokens} prompt tokens read in {self.prompt_seconds:.2f} s; "
            f"{self.generated_tokens} tokens generated in {decode_seconds:.2f} s{rate}; {self.finish_reason}"
        )


def open_executor(path: str | Path, options: LocalOptions) -> tuple[LoadedModel, Executor]:
    """Loads the model and what runs it; the executor owns its weights. Raises UserError as `load_for` and
    `make_executor` do."""
    loaded, options = load_for(path, options)
    return loaded, make_executor(loaded.model, options)


def load_for(path: str | Path, options: LocalOptions) -> tuple[LoadedModel, LocalOptions]:
    """Loads the model, and returns the options with what its checkpoint decides: a quantised one runs in its own format
    unless the options name a coarser one.

    Raises UserError as `load` does, and for a format finer than the checkpoint's.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    loaded = load(path, dtype=dtype, device=options.device)
    return loaded, _with_stored_format(loaded, options)


def computed_format(loaded: LoadedModel, options: LocalOptions) -> str:
    """The format of the weights that are computed with, of what `load_for` returned; a `StateIdentity` has it."""
    if options.quant != "none":
        return PACKED_FORMATS[options.quant]
    return str(loaded.model.dtype).removeprefix("torch.")


def _with_stored_format(loaded: LoadedModel, options: LocalOptions) -> LocalOptions:
    stored = loaded.stored_as
    if stored is None:
        return options
    if options.quant != "none":
        if BITS[options.quant] > BITS[stored]:
            raise UserError(
                f"quant {options.quant} is finer than the {stored} weights of {loaded.path}; leave --quant out, or "
                f"convert the source again with --quant {options.quant}"
            )
        return options
    backend, _ = choose_backend(loaded.model, options)
    if backend != "native":
        logger.info(
            "weights are %s in the checkpoint; the %s backend computes with %s", stored, backend, loaded.model.dtype
        )
        return options
    if loaded.model.dtype != torch.float32:
        raise UserError(f"dtype {options.dtype} would round the {stored} weights a second time; leave --dtype out")
    return replace(options, quant=stored)


class LocalEngine:
    """A loaded model behind an engine of one slot. A context manager: the engine's thread ends with it."""

    def __init__(self, loaded: LoadedModel, executor: Executor) -> None:
        self.loaded = loaded
        self.engine = Engine(executor, EngineOptions(max_slots=1), loaded.tokenizer)

    @classmethod
    def open(cls, path: str, options: LocalOptions) -> Self:
        """Loads the model. Raises UserError for what is no converted model and for a device that is not there."""
        return cls(*open_executor(path, options))

    def __enter__(self) -> Self:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()

    def generate(self, request: TextRequest) -> "TextGeneration":
        """Submits a request. Only one may run at a time. Raises InvalidRequest and EngineDead."""
        stream = TextStream(
            self.loaded.tokenizer,
            request.stop,
            context=tuple(request.prompt) if request.mid_text else (),
            min_tokens=request.sampling.min_tokens,
        )
        return TextGeneration(self.engine, stream, self.loaded.eos_ids, request)


class TextGeneration:
    """One running generation: iterate over its pieces of text, as they come; then read `summary`."""

    def __init__(self, engine: Engine, stream: TextStream, stop_ids: frozenset[int], request: TextRequest) -> None:
        self._engine = engine
        self._stream = stream
        self._stop_ids = stop_ids
        self._events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._last: FinishEvent | None = None
        self._ended = threading.Event()
        self._summary: GenerationSummary | None = None
        engine.submit(
            GenerationRequest(
                request_id=REQUEST_ID,
                prompt=tuple(request.prompt),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop_ids=stop_ids,
                stop=tuple(request.stop),
                continues_text=request.mid_text,
            ),
            self._receive,
        )

    @property
    def summary(self) -> GenerationSummary:
        assert self._summary is not None, "the generation has not finished"
        return self._summary

    def __iter__(self) -> Iterator[str]:
        """Pieces of text. Raises EngineDead when the engine fails; leaving early does not stop it: see `cancel`."""
        while self._summary is None:
            piece = self._take(self._events.get())
            if piece:
                yield piece

    def cancel(self) -> None:
        """Stops the generation and waits until the engine is free again. Nothing more comes out."""
        self._engine.cancel(REQUEST_ID)
        self._ended.wait()
        # Not from the queue: an interrupt may have lost the event that was being taken out.
        if self._summary is None:
            assert self._last is not None
            self._finish(self._last)

    def _receive(self, event: EngineEvent) -> None:
        """The engine's thread calls this."""
        self._events.put(event)
        if isinstance(event, FinishEvent):
            self._last = event
            self._ended.set()

    def _take(self, event: EngineEvent) -> str:
        if isinstance(event, FinishEvent):
            rest = self._stream.finish()
            self._finish(event)
            return rest
        if not isinstance(event, TokenEvent):
            return ""
        self._first_token = self._first_token or time.perf_counter()
        if event.token in self._stop_ids:
            return ""
        return self._stream.push(event.token)

    def _finish(self, event: FinishEvent) -> None:
        if event.reason == "error":
            raise EngineDead(event.error or "the engine failed")
        now = time.perf_counter()
        self._summary = GenerationSummary(
            finish_reason=event.reason,
            prompt_tokens=event.prompt_tokens,
            generated_tokens=event.generated_tokens,
            seconds=now - self._started,
            prompt_seconds=(self._first_token or now) - self._started,
        )


def add_local_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The arguments that say which model runs here, and how: read them with `open_engine` and `sampling_params`."""
    parser.add_argument("model", metavar="DST", help="directory that `unspool convert` wrote")
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="COUNT", help=f"tokens to generate at most ({max_tokens})"
    )
    sampling = parser.add_argument_group(
        "sampling",
        "What is not given comes from the model's generation_config.json if that says do_sample, "
        "else it is the default below.",
    )
    add_flags(sampling, SamplingParams)
    add_flags(parser.add_argument_group("machine"), LocalOptions)


def open_engine(args: argparse.Namespace) -> LocalEngine:
    """Raises UserError as `LocalEngine.open` does, and before it loads anything for flags that cannot be right."""
    from_flags(args, SamplingParams)
    if args.max_tokens < 1:
        raise UserError("max_tokens: must be at least 1")
    return LocalEngine.open(args.model, from_flags(args, LocalOptions))


def sampling_params(args: argparse.Namespace, engine: LocalEngine) -> SamplingParams:
    return from_flags(args, SamplingParams, engine.loaded.sampling_defaults)
