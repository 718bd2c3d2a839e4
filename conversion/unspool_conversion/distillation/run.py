"""One training run: what its stages share, and the end of every step, where it is logged, kept and may be stopped."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from unspool.errors import UserError
from unspool_conversion.distillation.corpus import Corpus
from unspool_conversion.distillation.loss_log import LossLog
from unspool_conversion.distillation.progress import Progress, load_checkpoint, save_checkpoint
from unspool_conversion.distillation.recipe import Recipe, Stage
from unspool_conversion.distillation.student import Student
from unspool_conversion.distillation.teachers import Teacher

_TRAINED, _STAGE = "trained/", "stage/"

Tensors = Callable[[], Mapping[str, Tensor]]
"""What a stage must find again to go on from here, beside the trained parameters."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and its state is kept."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run keeps itself, how often, and what makes it the same run."""

    directory: Path
    identity: Mapping[str, Any]
    resume: bool
    checkpoint_seconds: float


class Run:
    """Owns the progress, the log and the checkpoints; the stages own what they optimize.

    Raises UserError when there is nothing to resume, or something that should be.
    """

    def __init__(self, options: RunOptions, recipe: Recipe, student: Student, corpus: Corpus, teacher: Teacher) -> None:
        self.recipe, self.student, self.corpus, self.teacher = recipe, student, corpus, teacher
        self.seed = recipe.seed
        self._options = options
        self._stage_tensors: dict[str, Tensor] = {}
        self.progress = self._restore() if options.resume else Progress()
        options.directory.mkdir(parents=True, exist_ok=True)
        self.log = LossLog(options.directory, self.progress.log_bytes)
        self._stop = False
        self._counted = self._saved = time.monotonic()
        if not options.resume:
            self.save(dict)

    @property
    def directory(self) -> Path:
        return self._options.directory

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.progress.stage]

    def take_tensors(self) -> dict[str, Tensor]:
        """What the stage had kept when this run was resumed in the midst of it; only once."""
        taken, self._stage_tensors = self._stage_tensors, {}
        return taken

    def finish_step(self, record: Mapping[str, Any], num_tokens: int, tensors: Tensors) -> None:
        """Logs a step, moves on, and keeps the state when it is time. Raises Interrupted when asked to stop."""
        self._log(record, num_tokens)
        self.progress.step += 1
        self._keep_when_due(tensors)

    def finish_layer(self, record: Mapping[str, Any] | None = None, num_tokens: int = 0) -> None:
        """Moves on to the next layer; logs the record of one that took no steps."""
        if record is not None:
            self._log(record, num_tokens)
        self.progress.next_layer()
        self._keep_when_due(dict)

    def finish_stage(self) -> None:
        self.progress.next_stage()
        self.save(dict)
        self._keep_when_due(dict)

    def save(self, tensors: Tensors) -> None:
        """Raises UserError when the state cannot be written."""
        now = time.monotonic()
        self.progress.seconds += now - self._counted
        self._counted = self._saved = now
        self.progress.log_bytes = self.log.num_bytes
        trained = {_TRAINED + name: tensor for name, tensor in self.trained().items()}
        stage = {_STAGE + name: tensor for name, tensor in tensors().items()}
        save_checkpoint(self.directory, self._options.identity, self.progress, trained | stage)
        self.log.refresh_plot()

    def stop_diverged(self, what: str, layer: int | None, tensors: Tensors) -> NoReturn:
        """Keeps the state before the step that failed. Always raises UserError, naming stage, step and layer."""
        self.save(tensors)
        where = f", layer {layer}" if layer is not None else ""
        raise UserError(
            f"stage {self.progress.stage + 1} ({self.stage.kind}), step {self.progress.step + 1}{where}: {what} is NaN "
            f"or infinite. The state before this step is kept in {self.directory}; remove it and start again with "
            "lower learning rates in the recipe"
        )

    def trained(self) -> dict[str, Tensor]:
        """Every parameter that a stage so far may have changed, by its name in the student."""
        student, lora = self.student, self.recipe.lora
        begun = self.recipe.stages[: self.progress.stage + 1]
        weights = student.weights() if any(stage.kind == "finetune" for stage in begun) else {}
        return {**student.far(), **student.lora(lora.targets if lora else ()), **weights}

    @contextmanager
    def stopping_politely(self) -> Iterator[None]:
        """Within the block the first interrupt or polite kill lets the step end; a second one stops at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(number, signal.default_int_handler)

        # Only the main thread is told of signals.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _log(self, record: Mapping[str, Any], num_tokens: int) -> None:
        layer = {"layer": self.progress.layer} if self.stage.kind in ("bank", "layerwise") else {}
        self.log.append({"stage": self.progress.stage} | layer | {"step": self.progress.step} | dict(record))
        self.progress.tokens += num_tokens

    def _keep_when_due(self, tensors: Tensors) -> None:
        if self._stop or time.monotonic() - self._saved >= self._options.checkpoint_seconds:
            self.save(tensors)
        if self._stop:
            raise Interrupted

    @torch.no_grad()
    def _restore(self) -> Progress:
        progress, tensors = load_checkpoint(self._options.directory, self._options.identity)
        for name, tensor in tensors.items():
            if name.startswith(_TRAINED):
                self.student.parameters[name.removeprefix(_TRAINED)].copy_(tensor)
            else:
                self._stage_tensors[name.removeprefix(_STAGE)] = tensor
        return progress
