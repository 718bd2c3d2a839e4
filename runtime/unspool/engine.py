"""The engine: one thread that owns the slots, batches what is being decoded, and answers requests with events.

It deals in token ids only. Each turn of its loop decodes one token for every running request, then reads one chunk of
one prompt, the prompts that have a slot taking turns. What a request gets does not depend on what else runs: prompts
are read alone, and every row of a decode step has the bits that it has alone. Callers talk to the engine by messages
(`requests.py`), so that it could live in a process of its own.
"""

import collections
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.executor import Executor
from unspool.requests import (
    MAX_LOGPROBS,
    EngineBusy,
    EngineDead,
    EngineEvent,
    EventSink,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    PromptEvent,
    TokenEvent,
    TokenLogprobs,
)
from unspool.sampling import Sampler, token_logprobs
from unspool_kernels.native.decoder_program import LogitRows

logger = logging.getLogger(__name__)

MAX_COUNT = 1 << 20
SCORED_CHUNK = 64
"""Prompt tokens read at once when each one's log-probability is wanted, which takes the whole vocabulary's logits."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much the engine holds and how it shares its time."""

    max_slots: int = field(default=8, metadata={"help": "sequences in flight; each takes one state"})
    prefill_chunk: int = field(default=128, metadata={"help": "prompt tokens read between two decode steps"})
    max_queue: int = field(default=256, metadata={"help": "requests that may wait for a slot"})

    def __post_init__(self) -> None:
        for name in ("max_slots", "prefill_chunk", "max_queue"):
            if not 1 <= getattr(self, name) <= MAX_COUNT:
                raise InvalidRequest(name, f"must be between 1 and {MAX_COUNT}")


@dataclass
class _Sequence:
    """A request on its way: which slot it has, how much of its prompt is read, and what it last produced."""

    request: GenerationRequest
    sink: EventSink
    sampler: Sampler
    slot: int = -1
    consumed: int = 0
    generated: int = 0
    next_token: int = -1
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    cancelled: bool = False


class Engine:
    """Runs generation requests on a model. Thread-safe: `submit` and `cancel` may be called from anywhere."""

    def __init__(self, executor: Executor, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self._executor = executor
        self._pool = executor.new_pool(self.options.max_slots)
        self._free = list(reversed(range(self.options.max_slots)))
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._prefilling: collections.deque[_Sequence] = collections.deque()
        self._running: list[_Sequence] = []
        self._known: dict[str, _Sequence] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unspool-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots together."""
        return self._pool.num_bytes

    def start(self) -> None:
        self._thread.start()

    def shutdown(self) -> None:
        """Cancels what is in flight and waits for the thread to end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queues a request; `sink` gets its events on the engine's thread.

        Raises InvalidRequest, EngineBusy when the queue is full, EngineDead when nothing will be answered any more.
        """
        self._validate(request)
        sequence = _Sequence(request, sink, Sampler(request.sampling, request.prompt, self._executor.config.vocab_size))
        with self._changed:
            if not self.alive:
                raise EngineDead(f"the engine has stopped: {self._failure or 'shut down'}")
            if len(self._waiting) >= self.options.max_queue:
                raise EngineBusy(f"{len(self._waiting)} requests are waiting already")
            if request.request_id in self._known:
                raise InvalidRequest("request_id", "is in use by a request in flight")
            self._known[request.request_id] = sequence
            self._waiting.append(sequence)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; it then gets a FinishEvent. Unknown or finished ids are ignored."""
        with self._changed:
            if sequence := self._known.get(request_id):
                sequence.cancelled = True
                self._changed.notify()

    def _validate(self, request: GenerationRequest) -> None:
        vocabulary = self._executor.config.vocab_size
        if not request.prompt:
            raise InvalidRequest("prompt", "must hold at least one token")
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise InvalidRequest("prompt", f"token ids must be between 0 and {vocabulary - 1}")
        if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
            raise InvalidRequest("logit_bias", f"token ids must be between 0 and {vocabulary - 1}")
        if request.max_tokens < 0:
            raise InvalidRequest("max_tokens", "must not be negative")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(request, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise InvalidRequest(name, f"must be between 0 and {MAX_LOGPROBS}")

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._decode_running()
                self._lend_slots()
                self._prefill_next()
        except Exception as error:  # whatever it is, callers must learn that nothing more will come
            logger.exception("the engine failed")
            self._failure = error
        finally:
            self._fail_all()

    def _wait_for_work(self) -> bool:
        """Whether to go on, once there is something to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._known)
            return not self._stopping

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [sequence for sequence in self._known.values() if sequence.cancelled]
        for sequence in dropped:
            self._finish(sequence, "cancelled")

    def _decode_running(self) -> None:
        if not self._running:
            return
        slots = sorted(self._running, key=lambda sequence: sequence.slot)
        tokens = [[sequence.next_token] for sequence in slots]
        rows = self._executor.logits(tokens, self._pool, [sequence.slot for sequence in slots])
        for sequence, logits in zip(slots, rows, strict=True):
            self._produce(sequence, logits)

    def _lend_slots(self) -> None:
        """Gives free slots, zeroed, to the requests that wait longest."""
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._pool.clear(sequence.slot)
            self._prefilling.append(sequence)

    def _prefill_next(self) -> None:
        """Reads one chunk of the prompt whose turn it is."""
        if not self._prefilling:
            return
        sequence = self._prefilling.popleft()
        request, scored = sequence.request, sequence.request.prompt_logprobs is not None
        size = min(self.options.prefill_chunk, SCORED_CHUNK) if scored else self.options.prefill_chunk
        prompt = request.prompt[sequence.consumed : sequence.consumed + size]
        sequence.consumed += len(prompt)
        is_last = sequence.consumed == len(request.prompt)
        want: LogitRows = "every" if scored else "last" if is_last else "none"
        logits = self._executor.logits([prompt], self._pool, [sequence.slot], want)
        if scored:
            self._score_prompt(sequence, sequence.consumed - len(prompt), logits)
        if is_last:
            self._begin_decoding(sequence, logits[-1])
        else:
            self._prefilling.append(sequence)

    def _score_prompt(self, sequence: _Sequence, first: int, rows: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow each position of the chunk that began at `first`."""
        request, scores = sequence.request, sequence.prompt_logprobs
        if not scores:
            scores.append(None)
        following = request.prompt[first + 1 : first + 1 + len(rows)]
        for logits, token in zip(rows, following, strict=False):
            scores.append(token_logprobs(logits, token, request.prompt_logprobs or 0))

    def _begin_decoding(self, sequence: _Sequence, logits: Tensor) -> None:
        if sequence.request.prompt_logprobs is not None:
            self._send(sequence, PromptEvent(sequence.request.request_id, tuple(sequence.prompt_logprobs)))
        if sequence.request.max_tokens == 0:
            self._finish(sequence, "length")
            return
        self._running.append(sequence)
        self._produce(sequence, logits)

    def _produce(self, sequence: _Sequence, logits: Tensor) -> None:
        """Chooses a sequence's next token, reports it, and ends the sequence if that was its last."""
        request = sequence.request
        try:
            token = sequence.sampler.sample(logits)
        except FloatingPointError as error:  # this sequence's own numbers: the others go on
            self._finish(sequence, "error", str(error))
            return
        sequence.next_token = token
        sequence.generated += 1
        wanted = request.logprobs
        scores = token_logprobs(logits, token, wanted) if wanted is not None else None
        self._send(sequence, TokenEvent(request.request_id, token, scores))
        if token in request.stop_ids:
            self._finish(sequence, "stop")
        elif sequence.generated >= request.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: _Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Frees the sequence's slot and sends its last event."""
        request = sequence.request
        with self._changed:
            self._known.pop(request.request_id, None)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        for stage in (self._prefilling, self._running):
            if sequence in stage:
                stage.remove(sequence)
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1
        event = FinishEvent(request.request_id, reason, len(request.prompt), sequence.generated, error)
        self._send(sequence, event)

    def _send(self, sequence: _Sequence, event: EngineEvent) -> None:
        """Hands an event to its owner; an owner that fails loses its own request, not the engine."""
        try:
            sequence.sink(event)
        except Exception:
            logger.exception("the receiver of request %s failed", event.request_id)
            self.cancel(event.request_id)

    def _fail_all(self) -> None:
        with self._changed:
            self._stopping = True
            left: Iterable[_Sequence] = list(self._known.values())
        for sequence in left:
            if self._failure is None:
                self._finish(sequence, "cancelled")
            else:
                self._finish(sequence, "error", f"the engine failed: {type(self._failure).__name__}")
