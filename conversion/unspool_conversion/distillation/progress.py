"""How far a run has come, and the directory that keeps it: written aside, renamed, and only then is the old one
removed."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unspool.errors import UserError

SCHEMA_VERSION = 1
_PREFIX, _PARTIAL = "checkpoint-", ".checkpoint.partial"
_TENSORS, _STATE = "state.safetensors", "state.json"


@dataclass
class Progress:
    """Where the next step stands, and what is known of those before it."""

    stage: int = 0
    layer: int = 0
    """Of a layerwise stage."""
    step: int = 0
    tokens: int = 0
    """Tokens trained on, in all stages and layers."""
    seconds: float = 0.0
    log_bytes: int = 0
    """Length of the loss log."""
    errors: dict[str, float] = field(default_factory=dict)
    """What the current layer or stage has measured so far."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """One record a stage that has begun."""

    def next_stage(self) -> None:
        self.stage, self.layer, self.step, self.errors = self.stage + 1, 0, 0, {}

    def next_layer(self) -> None:
        self.layer, self.step, self.errors = self.layer + 1, 0, {}


def save_checkpoint(
    directory: Path, identity: Mapping[str, Any], progress: Progress, tensors: Mapping[str, Tensor]
) -> None:
    """Keeps a run. Raises UserError when it cannot be written; then the checkpoint before it is intact."""
    numbers = [int(path.name.removeprefix(_PREFIX)) for path in _checkpoints(directory)]
    partial, final = directory / _PARTIAL, directory / f"{_PREFIX}{max(numbers, default=0) + 1:08d}"
    state = {"schema_version": SCHEMA_VERSION, "identity": identity, "progress": asdict(progress)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        for path in (partial / _TENSORS, partial / _STATE, partial):
            _flush(path)
        partial.rename(final)
        _flush(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{directory}: the training state cannot be written ({error}); make room and pass --resume, which "
            f"continues from {'the state before' if numbers else 'the start'}"
        ) from error
    for path in _checkpoints(directory):
        if path != final:
            shutil.rmtree(path)


def has_checkpoint(directory: Path) -> bool:
    """Whether there is a state to resume from."""
    return bool(_checkpoints(directory))


def load_checkpoint(directory: Path, identity: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """The last state of a run.

    Raises UserError when there is none, it is damaged, or it is of a run with another identity.
    """
    found = _checkpoints(directory)
    if not found:
        raise UserError(f"{directory} holds no training state to resume; leave --resume out")
    try:
        state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(found[-1] / _TENSORS)
        known, progress = state["identity"], Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{found[-1]} is damaged ({error}); remove {directory} and start again") from error
    for name, value in identity.items():
        if known.get(name) != value:
            raise UserError(
                f"{directory} is a run with another {name}; resume it with the one it had, or remove it to start again"
            )
    return progress, tensors


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
