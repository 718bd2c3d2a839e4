"""Whose predictions a student learns: its own weights under the teacher's attention, or the model it came from."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unspool_conversion.distillation.student import Student


class Teacher(ABC):
    """Predicts the next tokens. Never records gradients."""

    @abstractmethod
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [P, V] at the P positions that are set in `positions` [B, T], of tokens [B, T]."""


class SharedTeacher(Teacher):
    """The student's own frozen weights, without adapter, under the teacher's attention."""

    def __init__(self, student: Student) -> None:
        self._student = student

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._student.model.lm_head(self._student.teacher_hidden(tokens)[positions])
        return logits


class SourceTeacher(Teacher):
    """The model that was converted, run by transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._model(tokens, use_cache=False).logits[positions]
        return logits
