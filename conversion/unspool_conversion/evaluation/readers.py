"""One way to read text with either model, the teacher or a converted one: hidden vectors first, logits for the few
positions where they are wanted, so that no text's worth of vocabulary-wide numbers ever exists."""

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from unspool.model import UnspoolForCausalLM
from unspool.state import StatePool

HEAD_BLOCK = 256
"""Positions whose logits exist at a time."""
READ_CHUNK = 2048
"""Tokens that a converted model reads at a time."""


class Reading(ABC):
    """A text being read; what was read so far is its context."""

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Reads on: tokens [T] to their final hidden vectors [T, hidden]."""

    @abstractmethod
    def fork(self) -> "Reading":
        """Another reading of the same context, which goes its own way from here."""


class Reader(ABC):
    """A model that reads."""

    model: PreTrainedModel

    @abstractmethod
    def begin(self) -> Reading:
        """A reading of an empty text."""

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden vectors [T, hidden] of a whole text [T]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [T, V] of final hidden vectors [T, hidden]."""


class TeacherReader(Reader):
    """A transformers model, with its own key-value cache."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.model = teacher
        self._head = teacher.get_output_embeddings()

    def begin(self) -> Reading:
        return _TeacherReading(self.model, DynamicCache(config=self.model.config))

    def hidden(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.model.base_model(tokens[None], use_cache=False).last_hidden_state[0]
        return vectors

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits.float()


class _TeacherReading(Reading):
    def __init__(self, teacher: PreTrainedModel, cache: DynamicCache) -> None:
        self._teacher, self._cache = teacher, cache

    def feed(self, tokens: Tensor) -> Tensor:
        output = self._teacher.base_model(tokens[None], past_key_values=self._cache, use_cache=True)
        vectors: Tensor = output.last_hidden_state[0]
        return vectors

    def fork(self) -> Reading:
        return _TeacherReading(self._teacher, copy.deepcopy(self._cache))


class ConvertedReader(Reader):
    """A converted model. Its memory does not grow with the text: it reads a chunk at a time from its state."""

    def __init__(self, model: UnspoolForCausalLM) -> None:
        self.model: UnspoolForCausalLM = model

    def begin(self) -> Reading:
        return _ConvertedReading(self.model)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.begin().feed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits.float()


class _ConvertedReading(Reading):
    def __init__(self, model: UnspoolForCausalLM) -> None:
        self._model = model
        self._pool = StatePool(model.config, 1, model.dtype, model.device)

    def feed(self, tokens: Tensor) -> Tensor:
        chunks = tokens[None].split(READ_CHUNK, dim=1)
        return torch.cat([self._model.hidden(chunk, slots=(self._pool, [0]))[0] for chunk in chunks])

    def fork(self) -> Reading:
        twin = _ConvertedReading(self._model)
        twin._pool.restore(0, self._pool.snapshot(0))
        return twin


def negative_log_likelihood(reader: Reader, tokens: Tensor) -> Tensor:
    """In nats, of each token after the first: tokens [T] to [T - 1]."""
    parts = zip(reader.hidden(tokens)[:-1].split(HEAD_BLOCK), tokens[1:].split(HEAD_BLOCK), strict=True)
    return torch.cat([F.cross_entropy(reader.logits(part), targets, reduction="none") for part, targets in parts])
