"""Layers that keep the teacher's full attention: which ones, and over how many tokens. A model that has some is not
constant-memory: its sessions are sized for that many tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unspool.errors import UserError
from unspool.mixer_spec import MixerSpec

_EVERY = re.compile(r"every:(\d+)")
_BLOCK = "kept_softmax"


class LayerChoice(NamedTuple):
    """Every n-th layer, or layers by their numbers."""

    every: int | None
    layers: tuple[int, ...]

    def among(self, num_layers: int) -> tuple[int, ...]:
        """The chosen layers, in order. Raises UserError when one does not exist, or none is chosen."""
        if self.every is not None:
            if self.every > num_layers:
                raise UserError(f"--keep-softmax every:{self.every} keeps none of the model's {num_layers} layers")
            return tuple(range(self.every - 1, num_layers, self.every))
        for layer in self.layers:
            if layer >= num_layers:
                raise UserError(f"layer {layer} does not exist; the model has layers 0 to {num_layers - 1}")
        return tuple(sorted(set(self.layers)))


class KeptSoftmax(NamedTuple):
    """What the `linearize` block says of such layers: their numbers, and the tokens that they see."""

    layers: tuple[int, ...]
    capacity: int

    @property
    def names(self) -> str:
        return f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"


def parse_layer_choice(text: str) -> LayerChoice:
    """Reads `every:8`, which takes layers 7, 15 and so on, or `0,15,29`. Raises ValueError for anything else."""
    if match := _EVERY.fullmatch(text.strip()):
        if int(match[1]) < 1:
            raise ValueError(f"{text!r}: every:1 is every layer, and there is nothing below")
        return LayerChoice(int(match[1]), ())
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is neither every:NUMBER nor layers like 0,15,29")
    return LayerChoice(None, tuple(map(int, parts)))


def softmax_capacity(max_tokens: int, asked: int | None, near_tokens: int) -> int:
    """The tokens that a kept layer sees: the teacher's `max_tokens`, or fewer if asked for.

    Raises UserError when that is no longer than the near set of the other layers.
    """
    capacity = max_tokens if asked is None else min(asked, max_tokens)
    if capacity <= near_tokens:
        raise UserError(
            f"a kept layer would see {capacity} tokens, and the others' near set has {near_tokens}; pass a larger "
            "--softmax-capacity or a smaller --window"
        )
    return capacity


def keep_softmax(spec: MixerSpec, capacity: int) -> MixerSpec:
    """The mixer of a kept layer: exact softmax over the last `capacity` tokens. Raises UserError for more than a window
    can hold."""
    try:
        return spec.replace(join="window", window=capacity, sinks=0, bank=0)
    except ValueError as error:
        raise UserError(f"a kept layer would see {capacity} tokens: {error}; pass --softmax-capacity") from error


def with_kept_softmax(block: Mapping[str, Any], layers: Sequence[int], capacity: int) -> dict[str, Any]:
    """The `linearize` block, which says so when layers keep full attention."""
    if not layers:
        return dict(block)
    return {**block, _BLOCK: {"layers": list(layers), "capacity": capacity}}


def kept_softmax(linearize: Mapping[str, Any] | None) -> KeptSoftmax | None:
    """What a `linearize` block says of layers that keep full attention; None when there are none."""
    if linearize is None or _BLOCK not in linearize:
        return None
    kept = linearize[_BLOCK]
    return KeptSoftmax(tuple(kept["layers"]), kept["capacity"])
