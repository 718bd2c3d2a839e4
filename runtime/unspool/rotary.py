"""Rotary position embedding as transformers' Llama has it, its inverse, and its limit for sinks.

Angles are formed in float64, so that position one million rotates as precisely as position one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unspool.config import UnspoolConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
"""`dynamic` rescales only beyond `max_position_embeddings`, a distance that the near set never spans."""


class Rotation(NamedTuple):
    """cos and sin [B, T, D/2] of one set of positions, times the scaling of the embedding."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotates x [B, T, H, ..., D]."""
        cos, sin = (table.reshape(*table.shape[:2], *[1] * (x.dim() - 3), table.shape[-1]) for table in self)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Rotary:
    """The model's frequencies. Not a module: frequencies follow from the configuration, so no checkpoint holds them."""

    def __init__(self, config: UnspoolConfig) -> None:
        frequencies, self.scaling = _frequencies(config)
        self._frequencies = {torch.device("cpu"): frequencies.double()}
        self.position_limit = config.max_position_embeddings - 1

    @property
    def frequencies(self) -> Tensor:
        """Radians per position [D/2], float64, on the CPU."""
        return self._frequencies[torch.device("cpu")]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation at positions [B, T], in the precision that transformers uses for that dtype."""
        angles = self._angles(positions)
        return Rotation((angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype))

    def sink_rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The query's rotation towards the sinks: beyond the length the teacher knew, their distance stops growing."""
        return self.rotation(positions.clamp(max=self.position_limit), dtype)

    def inverse(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Undoes `rotation` at positions [B, T]."""
        angles = self._angles(positions)
        return Rotation((angles.cos() / self.scaling).to(dtype), (-angles.sin() / self.scaling).to(dtype))

    def _angles(self, positions: Tensor) -> Tensor:
        device = positions.device
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        return positions[..., None].double() * self._frequencies[device]


def _frequencies(config: UnspoolConfig) -> tuple[Tensor, float]:
    parameters: dict[str, Any] = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_parameters: rope_type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
    if rope_type in ("default", "dynamic"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    with torch.device("cpu"):  # real numbers even while the model is built on the meta device
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    return frequencies, float(scaling)
