"""The engine: one thread that owns the slots, batches what is being computed, and answers requests with events.

It deals in token ids only. Each turn of its loop takes one token for every request that decodes, and some tokens of the
prompts that are being read. What a request gets does not depend on what else runs. Callers talk to the engine by
messages (`requests.py`), so that it could live in a process of its own.
"""

import dataclasses
import itertools
import logging
import threading
import time

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unspool.constraint import ConstraintFailed
from unspool.engine.options import EngineOptions
from unspool.engine.scheduler import Scheduler
from unspool.engine.sequence import EngineSequence, Piece
from unspool.engine.validation import check_request
from unspool.executor import Executor
from unspool.requests import (
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
)
from unspool.sampling import Sampler, token_logprobs
from unspool.state import TensorSpec
from unspool.text import StopWatcher

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """What an engine holds, and what it has done since it was made."""

    slots: int
    slot_bytes: int
    """Of all slots together."""
    computing: int
    waiting: int
    prompt_tokens: int
    """Of finished requests; `cached_tokens` of them were not read."""
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    checkpoints: int
    checkpoint_bytes: int


class Engine:
    """Runs generation requests on a model. Thread-safe: `submit` and `cancel` may be called from anywhere."""

    def __init__(
        self,
        executor: Executor,
        options: EngineOptions | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`tokenizer` is for stop strings. Raises InvalidRequest when the options' memory holds no slot."""
        self.options = options or EngineOptions()
        self._executor = executor
        self._tokenizer = tokenizer
        self._pool = executor.new_pool(self._num_slots())
        self._scheduler = Scheduler(self._pool, executor.shared_chunk, self.options)
        self._arriving: list[EngineSequence] = []
        self._known: dict[str, EngineSequence] = {}
        self._numbers = itertools.count()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unspool-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def num_slots(self) -> int:
        return self._pool.num_slots

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots together."""
        return self._pool.num_bytes

    @property
    def vocab_size(self) -> int:
        return int(self._executor.config.vocab_size)

    @property
    def state_specs(self) -> tuple[dict[str, TensorSpec], ...]:
        """Each layer's tensors of one state."""
        return self._pool.specs

    def statistics(self) -> EngineStatistics:
        with self._changed:
            known = len(self._known)
        scheduler = self._scheduler
        return EngineStatistics(
            slots=self.num_slots,
            slot_bytes=self.state_bytes,
            computing=scheduler.num_active,
            waiting=max(0, known - scheduler.num_active),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.num_preempted,
            checkpoints=len(scheduler.cache),
            checkpoint_bytes=scheduler.cache.num_bytes,
        )

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
        check_request(request, self._executor.config, self._pool, has_tokenizer=self._tokenizer is not None)
        sequence = self._sequence(request, sink)
        with self._changed:
            if not self.alive:
                raise EngineDead(f"the engine has stopped: {self._failure or 'shut down'}")
            waiting = len(self._known) - self._scheduler.num_active
            if waiting >= self.options.max_queue:
                raise EngineBusy(f"{waiting} requests are waiting already")
            if request.request_id in self._known:
                raise InvalidRequest("request_id", "is in use by a request in flight")
            self._known[request.request_id] = sequence
            self._arriving.append(sequence)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; it then gets a FinishEvent. Unknown or finished ids are ignored."""
        with self._changed:
            if sequence := self._known.get(request_id):
                sequence.cancelled = True
                self._changed.notify()

    def _num_slots(self) -> int:
        if self.options.slot_memory is None:
            return self.options.max_slots
        return self.options.slots_for(self._executor.new_pool(1).num_bytes)

    def _sequence(self, request: GenerationRequest, sink: EventSink) -> EngineSequence:
        constraint = request.constraint.fork() if request.constraint is not None else None
        return EngineSequence(
            request=request,
            sink=sink,
            sampler=Sampler(
                request.sampling, request.prompt, self.vocab_size, stop_ids=request.stop_ids, constraint=constraint
            ),
            watcher=self._watcher(request),
            number=next(self._numbers),
            arrived=time.monotonic(),
        )

    def _watcher(self, request: GenerationRequest) -> StopWatcher | None:
        if not request.stop:
            return None
        assert self._tokenizer is not None, "check_request has seen to it"
        context = request.prompt if request.continues_text else ()
        return StopWatcher(
            self._tokenizer, request.stop, request.skip_special_tokens, context, request.sampling.min_tokens
        )

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled_and_expired()
                for sequence, logits in self._scheduler.admit(time.monotonic()):
                    self._begin_decoding(sequence, logits)
                for pieces in self._scheduler.calls():
                    self._compute(pieces)
        except BaseException as error:  # whatever it is, callers must learn that nothing more will come
            logger.exception("the engine failed")
            self._failure = error
        finally:
            self._fail_all()

    def _wait_for_work(self) -> bool:
        """Whether to go on, once there is something to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._known)
            arriving, self._arriving = self._arriving, []
            for sequence in arriving:
                self._scheduler.add(sequence)
            return not self._stopping

    def _drop_cancelled_and_expired(self) -> None:
        with self._changed:
            cancelled = [sequence for sequence in self._known.values() if sequence.cancelled]
        for sequence in cancelled:
            self._finish(sequence, "cancelled")
        for sequence in self._scheduler.expired(time.monotonic()):
            self._finish(sequence, "expired")

    def _compute(self, pieces: list[Piece]) -> None:
        """One call of the executor, and what follows from it."""
        started = time.perf_counter()
        rows = self._executor.logits(
            [piece.tokens for piece in pieces],
            self._pool,
            [piece.sequence.slot for piece in pieces],
            [piece.want for piece in pieces],
        )
        self._scheduler.computed(pieces, time.perf_counter() - started)
        for piece in pieces:
            own, rows = piece.take(rows)
            if piece.sequence.is_read:
                self._produce(piece.sequence, own[0])
            else:
                self._read(piece, own)

    def _read(self, piece: Piece, rows: Tensor) -> None:
        """Takes in that tokens of a prompt were read; rows of logits as the piece wanted them."""
        sequence = piece.sequence
        if piece.want == "every":
            self._score_prompt(sequence, rows)
        self._scheduler.advance(piece, rows[-1] if len(rows) else None)
        if sequence.is_read:
            self._begin_decoding(sequence, rows[-1])

    def _score_prompt(self, sequence: EngineSequence, rows: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow each of those that were just read."""
        request, scores = sequence.request, sequence.prompt_logprobs
        if not scores:
            scores.append(None)
        following = request.prompt[sequence.consumed + 1 : sequence.consumed + 1 + len(rows)]
        for logits, token in zip(rows, following, strict=False):
            scores.append(token_logprobs(logits, token, request.prompt_logprobs or 0))

    def _begin_decoding(self, sequence: EngineSequence, logits: Tensor) -> None:
        request = sequence.request
        scores = tuple(sequence.prompt_logprobs) if request.prompt_logprobs is not None else None
        self._send(sequence, PromptEvent(request.request_id, sequence.cached, sequence.cache_miss, scores))
        if request.max_tokens == 0:
            self._finish(sequence, "length")
            return
        self._scheduler.begin_decoding(sequence)
        self._produce(sequence, logits)

    def _produce(self, sequence: EngineSequence, logits: Tensor) -> None:
        """Chooses a sequence's next token, reports it, and ends the sequence if that was its last."""
        request = sequence.request
        try:
            token = sequence.sampler.sample(logits)
            scores = token_logprobs(logits, token, request.logprobs) if request.logprobs is not None else None
            found = sequence.watcher.push(token) if sequence.watcher is not None else None
        except (FloatingPointError, ConstraintFailed) as error:
            self._finish(sequence, "error", str(error))
            return
        except Exception as error:  # all of this is the sequence's own: the others go on
            logger.exception("request %s failed", request.request_id)
            self._finish(sequence, "error", f"choosing its next token failed: {type(error).__name__}")
            return
        sequence.generated.append(token)
        self._send(sequence, TokenEvent(request.request_id, token, scores))
        if token in request.stop_ids:
            self._finish(sequence, "stop", stopped_by=token)
        elif found is not None or sequence.sampler.finished:
            self._finish(sequence, "stop", stopped_by=found)
        elif len(sequence.generated) >= request.max_tokens:
            self._finish(sequence, "length")

    def _finish(
        self,
        sequence: EngineSequence,
        reason: FinishReason,
        error: str | None = None,
        stopped_by: int | str | None = None,
    ) -> None:
        """Frees what the sequence holds and sends its last event."""
        request = sequence.request
        state = self._scheduler.remove(sequence, has_ended=reason in ("stop", "length"))
        with self._changed:
            self._known.pop(request.request_id, None)
        self._prompt_tokens += len(request.prompt)
        self._cached_tokens += sequence.cached
        self._generated_tokens += len(sequence.generated)
        event = FinishEvent(
            request.request_id,
            reason,
            prompt_tokens=len(request.prompt),
            generated_tokens=len(sequence.generated),
            error=error,
            stopped_by=stopped_by,
            state=state,
        )
        self._send(sequence, event)

    def _send(self, sequence: EngineSequence, event: EngineEvent) -> None:
        """Hands an event to its owner; an owner that fails loses its own request, not the engine."""
        try:
            sequence.sink(event)
        except Exception:
            logger.exception("the receiver of request %s failed", event.request_id)
            self.cancel(event.request_id)

    def _fail_all(self) -> None:
        with self._changed:
            self._stopping = True
            left = list(self._known.values())
        for sequence in left:
            if self._failure is None:
                self._finish(sequence, "cancelled")
            else:
                self._finish(sequence, "error", f"the engine failed: {type(self._failure).__name__}")
