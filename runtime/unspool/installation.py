"""What this install has: its requirements and extras, the kernels' backends, and whether a model runs. Never raises."""

import pkgutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

import torch
from packaging.requirements import Requirement

from unspool.bench.bandwidth import Bandwidth, BandwidthMeter
from unspool.config import UnspoolConfig
from unspool.executor import make_executor
from unspool.model import UnspoolForCausalLM
from unspool_kernels import ops
from unspool_kernels.contract import why_missing
from unspool_kernels.native.library import NativeUnavailable, instruction_set, instruction_sets, library

DISTRIBUTION = "unspool"
VERBS = "unspool.verbs"
MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Need:
    """A requirement, the version that is installed, if any, and whether that will do."""

    name: str
    requirement: str
    found: str | None
    satisfied: bool

    @property
    def command(self) -> str:
        return f"pip install '{self.requirement}'"


@dataclass(frozen=True)
class NativeLibrary:
    """The file, the instruction sets it is built for with whether this machine has them, and the chosen one; or why
    there is none."""

    file: str | None = None
    instruction_sets: dict[str, bool] | None = None
    chosen: str | None = None
    reason: str | None = None


def find_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def find_needs() -> dict[str, list[Need]]:
    """What the package requires under "", and what each of its extras does. Empty when the package is not installed."""
    found: dict[str, list[Need]] = {"": []}
    for text in _required():
        requirement = Requirement(text)
        # An extra's requirement has no marker but the extra's name, and at most one for the platform.
        for extra in ("", *_extras(requirement)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(_need(requirement))
                break
    return found


def find_native() -> NativeLibrary:
    try:
        return NativeLibrary(library()._name, instruction_sets(), instruction_set())
    except NativeUnavailable as error:
        return NativeLibrary(reason=str(error))


def find_backends() -> dict[str, dict[str, bool]]:
    """By family of ops and backend, whether it runs here; what does not falls to the reference, and says so."""
    families = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return {
        family: {backend: why_missing(backend, family) is None for backend in ("native", "triton")}
        for family in families
    }


def measure_bandwidth() -> Bandwidth | None:
    """None without the native library, which has the sweeps, or without memory for them."""
    try:
        return BandwidthMeter().measure()
    except (NativeUnavailable, MemoryError):
        return None


def why_no_model_runs() -> str | None:
    """Runs a tiny random model; the reason when that fails."""
    config = UnspoolConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    try:
        executor = make_executor(UnspoolForCausalLM(config))
        logits = executor.logits([[1, 2, 3]], executor.new_pool(1), [0])
    except Exception as error:  # whatever fails is what the report is for
        return f"a tiny model does not run: {_one_line(error)}"
    return None if bool(torch.isfinite(logits).all()) else "a tiny model computes values that are not finite"


def why_no_server() -> str | None:
    """Why the verb `serve` cannot be loaded, or None."""
    verb = next(iter(entry_points(group=VERBS, name="serve")), None)
    if verb is None:
        return "the verb `serve` is not installed: reinstall unspool"
    try:
        verb.load()
    except Exception as error:  # an import runs other people's code
        return f"the verb `serve` cannot be loaded: {_one_line(error)}"
    return None


def _required() -> list[str]:
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []


def _extras(requirement: Requirement) -> list[str]:
    """The extras that a requirement's marker speaks of."""
    clauses = str(requirement.marker or "").split("extra == ")[1:]
    return [clause.split('"')[1] for clause in clauses]


def _need(requirement: Requirement) -> Need:
    text = f"{requirement.name}{_bracketed(requirement)}{requirement.specifier}"
    found = find_version(requirement.name)
    satisfied = found is not None and requirement.specifier.contains(found, prereleases=True)
    return Need(requirement.name, text, found, satisfied)


def _bracketed(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON_CHARACTERS]
