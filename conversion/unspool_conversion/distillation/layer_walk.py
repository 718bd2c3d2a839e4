"""The teacher's residual stream over a text, one layer at a time: what a stage that fits layers by themselves reads."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool.decoder import Block
from unspool_conversion.distillation.run import Run
from unspool_conversion.distillation.student import Student, attend_as_teacher, without_adapter

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class LayerText:
    """The residual stream before a layer, and what the teacher's attention adds to it there: [N, T, hidden], on the
    CPU. The last `held_out` sequences are only measured on."""

    inputs: Tensor
    targets: Tensor
    held_out: int

    @property
    def num_training(self) -> int:
        return self.inputs.shape[0] - self.held_out


def walk_layers(run: Run, tokens: Tensor, held_out: int) -> Iterator[LayerText]:
    """The layers from the progress's on, over sequences [N, T] of which the last `held_out` are only measured on. No
    parameter records gradients; the consumer moves the progress on to the next layer."""
    student = run.student
    stream = _embed(student, tokens)
    for layer, block in enumerate(student.layers):
        targets = _teacher_outputs(student, block, stream, student.teacher_windows[layer])
        if layer >= run.progress.layer:
            student.freeze()
            yield LayerText(stream, targets, held_out)
        _advance(student, block, stream, targets)


def _rows_at_once(stream: Tensor) -> Iterator[slice]:
    rows = max(1, _TOKENS_AT_ONCE // stream.shape[1])
    return (slice(start, start + rows) for start in range(0, stream.shape[0], rows))


@torch.no_grad()
def _embed(student: Student, tokens: Tensor) -> Tensor:
    embedding = student.model.model.embed_tokens
    return torch.cat([embedding(tokens[rows].to(student.device)).cpu() for rows in _rows_at_once(tokens)])


@torch.no_grad()
def _teacher_outputs(student: Student, block: Block, stream: Tensor, window: int | None) -> Tensor:
    outputs = torch.empty_like(stream)
    with without_adapter(block):
        for rows in _rows_at_once(stream):
            x = stream[rows].to(student.device)
            outputs[rows] = attend_as_teacher(block, x, student.context((x.shape[0], x.shape[1])), window)
    return outputs


@torch.no_grad()
def _advance(student: Student, block: Block, stream: Tensor, outputs: Tensor) -> None:
    """Turns the stream before the layer into the teacher's stream after it, in place."""
    for rows in _rows_at_once(stream):
        stream[rows] = block.feed_forward((stream[rows] + outputs[rows]).to(student.device)).cpu()
