"""What a training run does, as data: its text, its adapter and its stages. Knows no files and no models."""

from collections.abc import Container
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, cast

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Positions = Literal["all", "far"]
TeacherKind = Literal["shared", "source"]


def _integer(default: Any, low: int, high: int) -> Any:
    return field(default=default, metadata={"type": int, "range": (low, high)})


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"type": float, "range": (low, high)})


def _choice(default: Any, *choices: object) -> Any:
    return field(default=default, metadata={"choices": choices})


def _projections(default: tuple[str, ...]) -> Any:
    return field(default=default, metadata={"each": PROJECTIONS})


def _check_fields(record: Any) -> None:
    """Raises ValueError, naming the field, for a value out of the range that the field declares."""
    for each in fields(record):
        value, declared = getattr(record, each.name), each.metadata
        if value is None and each.default is None:
            continue
        if "range" in declared:
            _check_number(each, value)
        elif "choices" in declared and not _is_one_of(value, declared["choices"]):
            raise ValueError(f"{each.name}: {value!r} is not one of {', '.join(map(str, declared['choices']))}")
        elif "each" in declared:
            _check_list(each, value)


def _check_number(each: "Field[Any]", value: object) -> None:
    low, high = each.metadata["range"]
    whole = each.metadata["type"] is int
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not low <= cast(float, value) <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{each.name}: {value!r} is not {kind} between {low} and {high}")


def _check_list(each: "Field[Any]", value: object) -> None:
    allowed = each.metadata["each"]
    if not isinstance(value, tuple) or len(set(value)) != len(value):
        raise ValueError(f"{each.name}: {value!r} is not a list of different entries")
    for entry in value:
        if not _is_one_of(entry, allowed):
            choices = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(allowed)
            raise ValueError(f"{each.name}: {entry!r} is not one of {choices}")


def _is_one_of(value: object, choices: Container[Any]) -> bool:
    """Unlike `in`, tells True from 1."""
    return isinstance(value, bool) == (choices == (False, True)) and value in choices


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The low-rank adapter (arXiv 2106.09685) that the stages train parts of: W x + alpha / rank B A x."""

    rank: int = _integer(8, 1, 4096)
    alpha: float = _number(16.0, 1e-3, 1e5)
    targets: tuple[str, ...] = _projections(PROJECTIONS)

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.targets:
            raise ValueError(f"targets: names no projection; choose from {', '.join(PROJECTIONS)}")


@dataclass(frozen=True, kw_only=True)
class BankStage:
    """Fits which tokens each layer's bank holds, by regression: without gradients, one pass over the text."""

    kind: ClassVar[str] = "bank"
    lora: ClassVar[tuple[str, ...]] = ()

    sequences: int | None = _integer(None, 1, 10**8)
    """How many of the recipe's training sequences are used: their residual stream is held in memory."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class LayerwiseStage:
    """Fits each layer to the teacher's attention output by itself, from the teacher's own residual stream."""

    kind: ClassVar[str] = "layerwise"

    steps: int = _integer(MISSING, 1, 10**7)
    """Of every layer."""
    sequences: int | None = _integer(None, 1, 10**8)
    """How many of the recipe's training sequences are used: their residual stream is held in memory."""
    batch: int = _integer(1, 1, 1 << 16)
    """Sequences a step."""
    map_lr: float = _number(0.01, 0, 10)
    gate_lr: float = _number(0.03, 0, 10)
    """Of gates and log-weights."""
    lora: tuple[str, ...] = _projections(())
    """Projections whose adapter is trained too."""
    lora_lr: float = _number(0.001, 0, 10)
    state_weight: float = _number(0.3, 0, 1e3)
    """Of the state's own loss: its read-out against the teacher's attention to what it holds. Only where the state
    holds exactly what left the window."""
    skip_below: float = _number(0.0, 0, 1)
    """Layers whose held-out error is below this from the start stay as they are."""
    least_bias: float | None = _number(None, -100, 100)
    """Log-weights start no lower than this: a far part that calibration turned off has no gradient."""
    evaluations: int = _integer(8, 1, 10**4)
    """Held-out measurements of a layer, evenly spread; the best one's parameters are kept."""
    final_lr: float = _number(0.05, 0, 1)
    """Share of each learning rate that the cosine ends with."""
    clip: float = _number(1.0, 1e-6, 1e6)
    gradient_noise: float = _number(0.0, 0, 100)
    """Variance eta of the noise added to gradients at step 0; eta / (1 + t)^0.55 at step t (arXiv 1511.06807)."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class LogitsStage:
    """Trains adapter and far part end to end, towards the teacher's predictions or the text's next tokens."""

    kind: ClassVar[str] = "logits"

    steps: int = _integer(MISSING, 1, 10**7)
    batch: int = _integer(1, 1, 1 << 16)
    """Sequences a step."""
    at_once: int = _integer(1, 1, 1 << 16)
    """Sequences of these in memory at a time."""
    lora: tuple[str, ...] = _projections(())
    lora_lr: float = _number(0.001, 0, 10)
    far_lr: float = _number(0.002, 0, 10)
    """0 leaves the far part as it is."""
    weight_decay: float = _number(0.0, 0, 10)
    cross_entropy: float = _number(0.0, 0, 1)
    """Share of the loss that is next-token cross-entropy; the rest is KL(teacher || student)."""
    confidence: bool = _choice(False, False, True)
    """Weighs each position's divergence by the teacher's largest probability there."""
    positions: Positions = _choice("all", "all", "far")
    """Which positions count: all, or only those that have tokens outside the near set."""
    window_dropout: float = _number(0.0, 0, 1)
    """Probability that a step of the first two thirds runs with a smaller window."""
    dropout_windows: tuple[int, ...] = field(default=(8, 16, 32), metadata={"each": range(1, 1 << 20)})
    warmup: int = _integer(4, 0, 10**6)
    final_lr: float = _number(0.05, 0, 1)
    clip: float = _number(1.0, 1e-6, 1e6)
    gradient_noise: float = _number(0.0, 0, 100)
    recompute: bool = _choice(False, False, True)
    """Computes each layer's activations again in the backward pass, for memory of one layer."""
    evaluations: int = _integer(4, 1, 10**4)
    """Held-out measurements, evenly spread."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.window_dropout and not self.dropout_windows:
            raise ValueError("dropout_windows: is empty, but window_dropout draws from it")


@dataclass(frozen=True, kw_only=True)
class FinetuneStage(LogitsStage):
    """The same, with every weight of the mixers instead of their adapter."""

    kind: ClassVar[str] = "finetune"

    weight_lr: float = _number(0.0001, 0, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora:
            raise ValueError("lora: a finetune stage trains the weights themselves; leave it out")


Stage = BankStage | LayerwiseStage | LogitsStage | FinetuneStage

STAGES: dict[str, type[Stage]] = {
    stage.kind: stage for stage in (BankStage, LayerwiseStage, LogitsStage, FinetuneStage)
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run. Raises ValueError, naming the field, for values that no run can have."""

    name: str
    description: str = ""
    seed: int = _integer(0, 0, 2**63 - 1)
    length: int = _integer(MISSING, 2, 1 << 24)
    """Tokens of a sequence."""
    sequences: int = _integer(MISSING, 2, 10**8)
    """Sequences to read, with those held out."""
    held_out: int = _integer(1, 1, 10**4)
    """Sequences that are only measured on."""
    teacher: TeacherKind = _choice("shared", "shared", "source")
    """shared: the teacher's attention over the converted model's own frozen weights, which takes no memory. source:
    the model that was converted, run by transformers."""
    lora: LoraOptions | None = None
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        _check_fields(self)
        if not isinstance(self.name, str) or not isinstance(self.description, str):
            raise ValueError("name and description: must be strings")
        if not self.stages:
            raise ValueError("stages: is empty")
        if self.held_out >= self.sequences:
            raise ValueError(f"held_out: {self.held_out} leaves none of {self.sequences} sequences to train on")
        targets = self.lora.targets if self.lora is not None else ()
        for index, stage in enumerate(self.stages):
            if missing := [name for name in stage.lora if name not in targets]:
                raise ValueError(f"stages[{index}].lora: {missing[0]} is not among the recipe's lora.targets")
        self._check_finetune()

    def _check_finetune(self) -> None:
        kinds = [stage.kind for stage in self.stages]
        if "finetune" not in kinds:
            return
        for kind in kinds[kinds.index("finetune") :]:
            if kind in ("bank", "layerwise"):
                raise ValueError(f"stages: {kind} after finetune has no frozen weights to take its targets from")
        uses_teacher = any(isinstance(stage, LogitsStage) and stage.cross_entropy < 1 for stage in self.stages)
        if self.teacher == "shared" and uses_teacher:
            raise ValueError("teacher: a finetune stage changes the shared weights; use teacher: source")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as its file would have it, every field spelled out."""
        stages = [{"kind": stage.kind} | asdict(stage) for stage in self.stages]
        values: dict[str, Any] = _with_lists(asdict(self) | {"stages": stages})
        return values


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(entry) for key, entry in value.items()}
    return [_with_lists(entry) for entry in value] if isinstance(value, list | tuple) else value
