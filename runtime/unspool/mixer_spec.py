"""What one layer's token mixer computes, as data: the near part, the far part and how they join.

`docs/layer.md` has the formulas. The named presets are published layers, or ours, as settings of this one record.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

Join = Literal["disjoint", "mixed", "window"]
Gate = Literal["scalar", "fixed", "none", "liger", "hgrn2"]
FeatureMap = Literal["hedgehog", "softmax", "elu", "identity"]
Memory = Literal["outer_product", "slots"]
StateHeads = Literal["kv", "q"]
NearMass = Literal["softmax", "row_max"]

_RANGES: dict[str, tuple[float, float]] = {
    "window": (1, 1 << 20),
    "sinks": (0, 1 << 10),
    "bank": (0, 1 << 20),
    "num_slots": (0, 1 << 16),
    "gate_normalizer": (1e-3, 1e6),
    "far_bias": (-1e3, 1e3),
    "mix": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One layer's mixer. Sizes are in tokens."""

    join: Join = "disjoint"
    """disjoint: the state holds only what left the window, the parts merge as shards of one softmax.
    mixed: the state holds every token, the parts are averaged. window: no state."""
    window: int = 256
    sinks: int = 4
    bank: int = 0
    """Tokens that left the window and stay exact, per key-value head: those of highest priority, which comes from their
    keys and values."""
    gate: Gate = "scalar"
    gate_normalizer: float = 16.0
    """Liger divides the log-gate by this (arXiv 2503.01496, section 3)."""
    feature_map: FeatureMap = "hedgehog"
    memory: Memory = "outer_product"
    """outer_product: one matrix state. slots: gated slot attention, two matrices with a softmax between them."""
    num_slots: int = 0
    """Slots of `memory="slots"`; 0 means one per head channel."""
    state_heads: StateHeads = "kv"
    state_rope: bool = False
    """Whether the state reads rotated queries and keys."""
    near_mass: NearMass = "softmax"
    """What the near part weighs in the disjoint join: its softmax mass, or that mass relative to the row maximum
    (LoLCATs, arXiv 2410.10254)."""
    far_bias: float = -6.0
    """Initial value of the far part's learned log-weight: almost off until calibration has set it."""
    mix: float = 0.5
    """Weight of the near part in the mixed join."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be a number between {low} and {high}")
        if self.has_state:
            self._check_combination()

    def _check_combination(self) -> None:
        slots = self.memory == "slots"
        conflicts = (
            (
                self.bank > 0 and (self.join != "disjoint" or self.near_mass != "softmax"),
                f"bank={self.bank} keeps tokens out of the state: use join='disjoint' and near_mass='softmax'",
            ),
            (slots and self.join == "disjoint", "memory='slots' has no normaliser to merge by: use join='mixed'"),
            (slots and self.gate != "liger", "memory='slots' writes 1 - gate per slot: use gate='liger'"),
            (slots and self.feature_map != "identity", "memory='slots' matches raw keys: use feature_map='identity'"),
            (
                self.gate == "hgrn2" and self.feature_map == "hedgehog",
                "gate='hgrn2' writes one feature per channel: use feature_map='softmax' or 'elu'",
            ),
            (
                self.join == "disjoint" and self.feature_map == "identity",
                "feature_map='identity' can be negative, so join='disjoint' cannot take its logarithm",
            ),
        )
        for conflict, message in conflicts:
            if conflict:
                raise ValueError(message)

    @property
    def has_state(self) -> bool:
        return self.join != "window"

    @property
    def near_tokens(self) -> int:
        """Tokens that the layer holds exactly: a text no longer than this is read as the teacher reads it."""
        return self.sinks + self.window + (self.bank if self.has_state else 0)

    @property
    def normalized(self) -> bool:
        """Whether the state carries a normaliser row beside its value rows."""
        return self.join == "disjoint"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MixerSpec":
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown mixer field {unknown[0]!r}; known fields: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> "MixerSpec":
        return replace(self, **changes)


_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(MixerSpec).items() if get_args(hint)
}

_LIGER = MixerSpec(join="mixed", window=64, sinks=0, gate="liger", feature_map="softmax", mix=0.5)

PRESETS: dict[str, MixerSpec] = {
    "disjoint": MixerSpec(),
    "window-only": MixerSpec(join="window"),
    "liger-gla": _LIGER,
    "liger-hgrn2": _LIGER.replace(gate="hgrn2"),
    "liger-gsa": _LIGER.replace(memory="slots", feature_map="identity"),
    # sigmoid(-2.197) = 0.1 weighs the window (LoLCATs), so -log 0.1 weighs the far part against it.
    "lolcats": MixerSpec(
        window=64, sinks=0, gate="none", state_heads="q", state_rope=True, near_mass="row_max", far_bias=2.302585
    ),
}
