"""The rows of every table: the converted model and what it would be with less, sharing its weights.

The teacher is the ceiling. Window-only has the same window and sinks and no far part; of equal bytes, its window is as
long as the bytes of the far part allow. State-only is left the smallest near set that there is, one token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from unspool.config import UnspoolConfig, linearize_block
from unspool.mixer_spec import MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool.state import layer_state_specs
from unspool_conversion.evaluation.readers import ConvertedReader, Reader, TeacherReader

TEACHER = "teacher"
WINDOW_ONLY = "window-only"
EQUAL_BYTES = "window-only, equal bytes"
STATE_ONLY = "state-only"
CONVERTED = "converted"

NO_STATE = "no layer of this model has a state"


@dataclass(frozen=True)
class Rows:
    """The models to measure by name, in the order of the tables; and the names of those left out, with the reason."""

    readers: Mapping[str, Reader]
    left_out: Mapping[str, str]

    @property
    def converted(self) -> UnspoolForCausalLM:
        model = self.readers[CONVERTED].model
        assert isinstance(model, UnspoolForCausalLM)
        return model

    def describe(self) -> dict[str, Any]:
        """Per sequence, in float32: what each converted row keeps near and in its state, in bytes, and its windows."""
        return {
            name: _describe(reader.model.config)
            for name, reader in self.readers.items()
            if isinstance(reader.model, UnspoolForCausalLM)
        }


def make_rows(teacher: PreTrainedModel, model: UnspoolForCausalLM) -> Rows:
    """Every row that the model's layers allow."""
    readers: dict[str, Reader] = {
        TEACHER: TeacherReader(teacher),
        WINDOW_ONLY: ConvertedReader(window_only(model)),
        EQUAL_BYTES: ConvertedReader(window_only(model, equal_bytes=True)),
    }
    has_state = any(spec.has_state for spec in model.config.mixer_specs())
    if has_state:
        readers[STATE_ONLY] = ConvertedReader(state_only(model))
    readers[CONVERTED] = ConvertedReader(model)
    return Rows(readers, {} if has_state else {STATE_ONLY: NO_STATE})


def window_only(model: UnspoolForCausalLM, *, equal_bytes: bool = False) -> UnspoolForCausalLM:
    """The same weights with every state and bank removed; with `equal_bytes`, windows widened by what these cost."""
    config = model.config
    layers: dict[int, dict[str, Any]] = {
        layer: {"join": "window", "bank": 0} | ({"window": equal_bytes_window(config, spec)} if equal_bytes else {})
        for layer, spec in enumerate(config.mixer_specs())
    }
    return _with_layers(model, WINDOW_ONLY, layers)


def state_only(model: UnspoolForCausalLM) -> UnspoolForCausalLM:
    """The same weights with a near set of one token in every layer that has a state: the state reads all the others,
    in a mixed join the last as well. Layers without a state, which would see nothing, keep their window."""
    layers: dict[int, dict[str, Any]] = {
        layer: {"window": 1, "sinks": 0, "bank": 0}
        for layer, spec in enumerate(model.config.mixer_specs())
        if spec.has_state
    }
    return _with_layers(model, STATE_ONLY, layers)


def _with_layers(model: UnspoolForCausalLM, name: str, layers: dict[int, dict[str, Any]]) -> UnspoolForCausalLM:
    """A model that shares every weight it has with `model`, whose layers differ in the given fields."""
    config = model.config
    assert config.linearize is not None
    default = MixerSpec.from_dict(config.linearize["default"])
    previous = config.linearize.get("layers", {})
    changed = {layer: previous.get(str(layer), {}) | layers.get(layer, {}) for layer in range(config.num_hidden_layers)}
    values = config.to_dict() | {"linearize": linearize_block(name, default, changed), "layer_types": None}
    with torch.device("meta"):
        variant = UnspoolForCausalLM(UnspoolConfig.from_dict(values))
    wanted = variant.state_dict().keys()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    variant.load_state_dict(weights, assign=True)
    variant.tie_weights()
    variant.eval()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    return variant


def equal_bytes_window(config: UnspoolConfig, spec: MixerSpec) -> int:
    """The shortest window whose near set takes no fewer bytes than the layer's near set and state together."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * torch.float32.itemsize
    return -(-sum(_layer_bytes(config, spec)) // per_token) - spec.sinks


def _layer_bytes(config: UnspoolConfig, spec: MixerSpec) -> tuple[int, int]:
    """Bytes of a layer's near set and of its state, for one sequence."""
    sizes = {name: tensor.num_bytes for name, tensor in layer_state_specs(config, spec, torch.float32).items()}
    near = sum(size for name, size in sizes.items() if name.startswith("near_"))
    return near, sum(sizes.values()) - near


def _describe(config: UnspoolConfig) -> dict[str, Any]:
    specs = config.mixer_specs()
    near, far = (sum(sizes) for sizes in zip(*(_layer_bytes(config, spec) for spec in specs), strict=True))
    return {"near_bytes": near, "state_bytes": far, "windows": sorted({spec.window for spec in specs})}
