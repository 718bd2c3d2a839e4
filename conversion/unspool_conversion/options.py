"""What a conversion is asked to do, and what that means for each layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unspool.config import linearize_block
from unspool.errors import UserError
from unspool.executor import Quant
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool_conversion.kept_softmax import LayerChoice, keep_softmax, softmax_capacity, with_kept_softmax

OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]

_LAYER_RANGE = re.compile(r"(\d+)(?:-(\d+))?=(\d+)")


class PerLayer(NamedTuple):
    """A number for every layer, and the layers that have another: first layer, last layer, number."""

    default: int | None
    ranges: tuple[tuple[int, int, int], ...]


def parse_per_layer(text: str) -> PerLayer:
    """Reads `256`, or `256,0-3=512,7=64`, or only exceptions. Raises ValueError for anything else."""
    default, ranges = None, []
    for position, part in enumerate(text.split(",")):
        if match := _LAYER_RANGE.fullmatch(part.strip()):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"{part!r} ends before it begins")
            ranges.append((first, last, int(match[3])))
        elif position == 0 and part.strip().isdecimal():
            default = int(part)
        else:
            raise ValueError(f"{part!r} is neither a number nor LAYER=NUMBER nor FIRST-LAST=NUMBER")
    return PerLayer(default, tuple(ranges))


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which text to calibrate on and how much of it."""

    enabled: bool = True
    text: Path | None = None
    """Plain text or JSON lines, possibly gzipped; None is the text that ships with the package."""
    sequences: int = 2
    length: int = 2048

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.length if self.enabled else 0


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """One conversion."""

    source: str
    destination: Path
    revision: str | None = None
    preset: str = "disjoint"
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of MixerSpec that every layer has instead of the preset's."""
    window: PerLayer = PerLayer(None, ())
    sinks: PerLayer = PerLayer(None, ())
    bank: PerLayer = PerLayer(None, ())
    keep_softmax: LayerChoice | None = None
    """Layers that keep the teacher's full attention, whatever the other options say of them."""
    softmax_capacity: int | None = None
    """Tokens that those layers see; None is as many as the teacher was made for."""
    dtype: OutputDtype = "auto"
    quant: Quant = "none"
    """Format of the weights on disk; all but "none" start from float32 and take no `dtype`."""
    max_shard_bytes: int = 2_000_000_000
    overwrite: bool = False
    calibration: CalibrationOptions = CalibrationOptions()
    adapter: Path | None = None
    """What `unspool distill` trained for this model; it takes the place of calibration and, unless layers are named
    here, says what they are."""

    def __post_init__(self) -> None:
        if self.adapter is not None and self.calibration.text is not None:
            raise UserError("--adapter brings what --calibration would fit; leave one out")
        if self.softmax_capacity is not None and self.keep_softmax is None:
            raise UserError("--softmax-capacity is of the layers that --keep-softmax names, and it names none")
        if self.quant != "none" and self.dtype != "auto":
            raise UserError(f"--quant {self.quant} says how weights are stored, and so does --dtype; leave one out")

    @property
    def names_layers(self) -> bool:
        """Whether anything here says what the layers are."""
        numbers = (self.window, self.sinks, self.bank)
        named = any(each != PerLayer(None, ()) for each in numbers) or bool(self.overrides)
        return named or self.preset != "disjoint" or self.keep_softmax is not None

    def linearize(self, teacher_windows: Sequence[int | None], max_tokens: int) -> dict[str, Any]:
        """The `linearize` block for a teacher whose layers have these windows and that was made for that many tokens.

        A layer whose own window fits into the near set is kept as it is. Raises UserError for an unknown preset, a
        layer that does not exist, or fields that no mixer has together.
        """
        if self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r} is not known; choose from {', '.join(PRESETS)}")
        num_layers = len(teacher_windows)
        kept = self.keep_softmax.among(num_layers) if self.keep_softmax is not None else ()
        try:
            default = PRESETS[self.preset].replace(**self.overrides | _defaults(self.window, self.sinks, self.bank))
            specs = [self._layer(default, layer, window) for layer, window in enumerate(teacher_windows)]
            capacity = softmax_capacity(max_tokens, self.softmax_capacity, default.near_tokens) if kept else max_tokens
            for layer in kept:
                specs[layer] = keep_softmax(default, min(capacity, teacher_windows[layer] or capacity))
        except ValueError as error:
            raise UserError(str(error)) from error
        self._check_ranges(num_layers)
        changes = {layer: _differences(spec, default) for layer, spec in enumerate(specs) if spec != default}
        # A window of the teacher's own is no memory that grows.
        full = [layer for layer in kept if (teacher_windows[layer] or capacity) >= capacity]
        return with_kept_softmax(linearize_block(self.preset, default, changes), full, capacity)

    def _layer(self, default: MixerSpec, layer: int, teacher_window: int | None) -> MixerSpec:
        changes = {
            name: number
            for name, numbers in (("window", self.window), ("sinks", self.sinks), ("bank", self.bank))
            for first, last, number in numbers.ranges
            if first <= layer <= last
        }
        spec = default.replace(**changes)
        if teacher_window is not None and teacher_window <= spec.near_tokens:
            spec = spec.replace(join="window", window=teacher_window, sinks=0, bank=0)
        return spec

    def _check_ranges(self, layers: int) -> None:
        for _, last, _ in (*self.window.ranges, *self.sinks.ranges, *self.bank.ranges):
            if last >= layers:
                raise UserError(f"layer {last} does not exist; the model has layers 0 to {layers - 1}")


def _defaults(window: PerLayer, sinks: PerLayer, bank: PerLayer) -> dict[str, int]:
    numbers = {"window": window.default, "sinks": sinks.default, "bank": bank.default}
    return {name: number for name, number in numbers.items() if number is not None}


def _differences(spec: MixerSpec, default: MixerSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.to_dict().items() if value != getattr(default, name)}
