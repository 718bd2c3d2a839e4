"""Slots: what every layer carries from token to token, for a fixed number of sequences, in tensors that never grow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unspool.config import UnspoolConfig
from unspool.mixer_spec import MixerSpec

LayerState = dict[str, Tensor]
"""One layer's state by name, each tensor [slots, heads, ...]: near_keys and near_values [., H_kv, M + W + B, D], sinks,
ring and bank; bank_scores and bank_positions [., H_kv, B]; far [., H, V (+ 1), K] V-first with its normaliser as the
last row, or slot_keys and slot_values [., H, M, D]."""


class TensorSpec(NamedTuple):
    """One sequence's tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layer_state_specs(
    config: UnspoolConfig, spec: MixerSpec, dtype: torch.dtype, far_dtype: torch.dtype | None = None
) -> dict[str, TensorSpec]:
    """The tensors of one layer for one sequence. The near set has the model's dtype; what is summed over time is
    float32 (float64 in a float64 model) unless `far_dtype` says otherwise."""
    near = TensorSpec((config.num_key_value_heads, spec.near_tokens, config.head_dim), dtype)
    specs = {"near_keys": near, "near_values": near}
    if spec.has_state and spec.bank:
        entries = (config.num_key_value_heads, spec.bank)
        specs |= {
            "bank_scores": TensorSpec(entries, torch.float32),
            "bank_positions": TensorSpec(entries, torch.int32),
        }
    summed = far_dtype or torch.promote_types(dtype, torch.float32)
    heads, channels = state_heads(config, spec), config.head_dim
    if spec.has_state and spec.memory == "slots":
        slot = TensorSpec((heads, spec.num_slots or channels, channels), summed)
        specs |= {"slot_keys": slot, "slot_values": slot}
    elif spec.has_state:
        rows = channels + int(spec.normalized)
        specs["far"] = TensorSpec((heads, rows, feature_size(config, spec)), summed)
    return specs


def state_heads(config: UnspoolConfig, spec: MixerSpec) -> int:
    return config.num_key_value_heads if spec.state_heads == "kv" else config.num_attention_heads


def feature_size(config: UnspoolConfig, spec: MixerSpec) -> int:
    """Features per head of the far part's queries and keys."""
    return config.head_dim * (2 if spec.feature_map == "hedgehog" else 1)


def state_bytes(config: UnspoolConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state per sequence, at any length."""
    layers = (layer_state_specs(config, spec, dtype) for spec in config.mixer_specs())
    return sum(tensor.num_bytes for layer in layers for tensor in layer.values())


def kv_cache_bytes(config: UnspoolConfig, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that the teacher's key-value cache takes at that length."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * tokens


class _Arena:
    """Hands out one piece of memory as tensors, each on a cache line of its own."""

    def __init__(self, memory: Tensor) -> None:
        self._rest = memory

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        tensor, self._rest = self._rest[:num_bytes].view(dtype).view(shape), self._rest[_whole_lines(num_bytes) :]
        return tensor


def _arena_bytes(specs: Sequence[dict[str, TensorSpec]], num_slots: int) -> int:
    return sum(_whole_lines(num_slots * tensor.num_bytes) for layer in specs for tensor in layer.values())


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


class SlotRows:
    """Reads and writes chosen slots of a pool's tensors; neighbouring slots are viewed in place, others copied."""

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        first = slots[0]
        in_order = list(slots) == list(range(first, first + len(slots)))
        self._range = slice(first, first + len(slots)) if in_order else None
        self._index = torch.tensor(slots, device=device)

    def read(self, pool: Tensor) -> Tensor:
        """The chosen rows [B, ...]: a view when `is_view`, else a copy."""
        return pool[self._range] if self._range is not None else pool.index_select(0, self._index)

    def write(self, pool: Tensor, rows: Tensor) -> None:
        """Stores rows that `read` gave, or new ones; costs nothing for rows that are still the pool's own memory."""
        if self._range is None:
            pool.index_copy_(0, self._index, rows)
        elif rows.data_ptr() != pool[self._range].data_ptr():
            pool[self._range] = rows


@dataclass(frozen=True)
class SlotSnapshot:
    """A copy of one slot: its position and every layer's tensors."""

    position: int
    layers: tuple[LayerState, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())


class StatePool:
    """State tensors for `num_slots` sequences, allocated once. A slot is zeroed before it is lent again."""

    def __init__(
        self,
        config: UnspoolConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        far_dtype: torch.dtype | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        """`allocate` gives zeroed uint8 memory of so many bytes; without it the tensors are PyTorch's own."""
        self.device = torch.device(device)
        specs = [layer_state_specs(config, spec, dtype, far_dtype) for spec in config.mixer_specs()]
        with torch.inference_mode(False):  # so that a pool made in inference mode can be written to outside it
            arena = _Arena(allocate(_arena_bytes(specs, num_slots))) if allocate is not None else None
            zeros = arena.zeros if arena is not None else partial(torch.zeros, device=self.device)
            self.layers: tuple[LayerState, ...] = tuple(
                {name: zeros((num_slots, *shape), dtype=kind) for name, (shape, kind) in layer.items()}
                for layer in specs
            )
        self.positions: list[int] = [0] * num_slots
        """Tokens that each slot has consumed."""

    @property
    def num_slots(self) -> int:
        return len(self.positions)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    @property
    def specs(self) -> tuple[dict[str, TensorSpec], ...]:
        """Each layer's tensors for one slot."""
        return tuple(
            {name: TensorSpec(tuple(rows.shape[1:]), rows.dtype) for name, rows in layer.items()}
            for layer in self.layers
        )

    def clear(self, slot: int) -> None:
        """Zeroes a slot, so that nothing of its last sequence is left."""
        self.positions[slot] = 0
        for layer in self.layers:
            for tensor in layer.values():
                tensor[slot].zero_()

    def fits(self, snapshot: SlotSnapshot) -> bool:
        """Whether a snapshot has the tensors of a slot."""
        return len(snapshot.layers) == len(self.layers) and all(
            saved.keys() == layer.keys()
            and all(
                saved[name].shape == rows.shape[1:] and saved[name].dtype == rows.dtype for name, rows in layer.items()
            )
            for saved, layer in zip(snapshot.layers, self.layers, strict=True)
        )

    def snapshot(self, slot: int, device: torch.device | str | None = None) -> SlotSnapshot:
        """A copy on the pool's own device, or on another."""
        where = self.device if device is None else device
        layers = tuple(
            {name: tensor[slot].to(where, copy=True) for name, tensor in layer.items()} for layer in self.layers
        )
        return SlotSnapshot(self.positions[slot], layers)

    def restore(self, slot: int, snapshot: SlotSnapshot) -> None:
        self.positions[slot] = snapshot.position
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            for name, tensor in layer.items():
                tensor[slot].copy_(saved[name])

    def reorder(self, source: Tensor) -> None:
        """Slot i takes what slot source[i] held, for every i at once."""
        self.positions = [self.positions[i] for i in source.tolist()]
        for layer in self.layers:
            for tensor in layer.values():
                tensor.copy_(tensor.index_select(0, source.to(tensor.device)))
