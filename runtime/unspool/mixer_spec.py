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

# A gate that needs no feature map of the key: HGRN2 writes 1 - gate in the place of the key.
MAX_WINDOW = 1 << 20
MAX_SINKS = 1 << 10


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One layer's mixer. Sizes are in tokens."""

    join: Join = "disjoint"
    """disjoint: the state holds only what left the window, the parts merge as shards of one softmax.
    mixed: the state holds every token, the parts are averaged. window: no state."""
    window: int = 256
    sinks: int = 4
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
        if not 1 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window={self.window} must be between 1 and {MAX_WINDOW} tokens")
        if not 0 <= self.sinks <= MAX_SINKS:
            raise ValueError(f"sinks={self.sinks} must be between 0 and {MAX_SINKS} tokens")
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"mix={self.mix} must be between 0 and 1")
        if self.join == "disjoint" and self.memory == "slots":
            raise ValueError("memory='slots' has no normaliser to merge by: use it with join='mixed'")
        if self.memory == "slots" and self.gate != "liger":
            raise ValueError("memory='slots' writes 1 - gate per slot: use it with gate='liger'")
        if self.join == "disjoint" and self.feature_map == "identity":
            raise ValueError("feature_map='identity' can be negative, so join='disjoint' cannot take its logarithm")

    @property
    def has_state(self) -> bool:
        return self.join != "window"

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
