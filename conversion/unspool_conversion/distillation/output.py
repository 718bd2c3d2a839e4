"""Writes what a finished run made: the adapter, the model with the adapter merged into it, and the report."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unspool.config import UnspoolConfig
from unspool_conversion.architectures import UNCHANGED
from unspool_conversion.distillation import adapter
from unspool_conversion.distillation.loss_log import LOG, PLOT
from unspool_conversion.distillation.run import Run
from unspool_conversion.plan import PlannedTensor
from unspool_conversion.reports import MODEL_CARD, REPORT, load_report, save_report, write_model_card
from unspool_conversion.safetensors_source import INDEX
from unspool_conversion.writer import split_into_shards, write_shards

ADAPTER = "adapter"
_MAX_SHARD_BYTES = 2_000_000_000


class StoredModel:
    """The tensors of a converted model's directory, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self.planned: list[PlannedTensor] = []
        for path in sorted(directory.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  this is no mapping
                    self._files[name] = path
                    stored = file.get_slice(name)  # whose header says all: no weight is read
                    shape, dtype = tuple(stored.get_shape()), stored[:0].dtype
                    self.planned.append(PlannedTensor(name, name, UNCHANGED, shape, dtype))
        self.planned.sort(key=lambda tensor: tensor.name)

    def load(self, name: str) -> Tensor:
        """Raises KeyError for a name that the model does not have."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.planned)


def write_output(directory: Path, name: str, model: Path, config: UnspoolConfig, run: Run) -> dict[str, Any]:
    """Fills the directory of the model `name`, trained from the one at `model`; returns its report."""
    (directory / ADAPTER).mkdir()
    write_adapter(directory / ADAPTER, config, run)
    stored = StoredModel(model)
    load = adapter.apply_adapter(directory / ADAPTER, config, stored.load)
    shards = split_into_shards(stored.planned, _MAX_SHARD_BYTES)
    write_shards(directory, shards, load, lambda done, total: None)
    for path in model.iterdir():
        if path.is_file() and not path.match("model*.safetensors") and path.name not in (INDEX, REPORT, MODEL_CARD):
            shutil.copyfile(path, directory / path.name)
    for log in (LOG, PLOT):
        if (run.directory / log).is_file():
            shutil.copyfile(run.directory / log, directory / log)
    report = _report(load_report(model), name, run)
    save_report(directory, report)
    write_model_card(directory, report)
    return report


def write_adapter(directory: Path, config: UnspoolConfig, run: Run) -> None:
    """The adapter alone: the low-rank part where the recipe has one, far part, other trained weights, recipe."""
    student, kinds = run.student, [stage.kind for stage in run.recipe.stages]
    if student.adapted is not None:
        student.adapted.save_pretrained(directory, save_embedding_layers=False)
        (directory / MODEL_CARD).unlink(missing_ok=True)  # peft's own, of blanks to fill in
    _save(student.far(), directory / adapter.FAR)
    if "finetune" in kinds:
        names = {name: name.replace(".base_layer.", ".") for name in student.weights()}
        _save({names[name]: tensor for name, tensor in student.weights().items()}, directory / adapter.MIXERS)
    adapter.write_description(directory, config)
    recipe = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    (directory / adapter.RECIPE).write_text(recipe, encoding="utf-8")


def changes_weights(run: Run) -> bool:
    """Whether the run may have changed more than the far part, so that short texts too are only approximated."""
    return any(stage.lora or stage.kind == "finetune" for stage in run.recipe.stages)


def _save(tensors: Any, path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _report(old: dict[str, Any], name: str, run: Run) -> dict[str, Any]:
    """The report of the model that was trained, without what was measured of it, and with how it was trained."""
    report = {key: value for key, value in old.items() if key not in ("verification", "evaluation")} | {"name": name}
    if changes_weights(run):
        report["exact_tokens"] = 0
    fits_banks = any(stage.kind == "bank" for stage in run.recipe.stages)
    trained = sum(
        tensor.numel()
        for name, tensor in run.trained().items()
        if fits_banks or ".far.bank." not in name  # which tokens a bank chooses has no gradient
    )
    # Parameters of the model itself, without the adapter's, which is merged.
    total = sum(p.numel() for key, p in run.student.parameters.items() if ".lora_" not in key)
    progress = run.progress
    report["distillation"] = {
        "recipe": run.recipe.to_dict(),
        "seed": run.seed,
        "sequences": run.corpus.tokens.shape[0],
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "trained_parameters": trained,
        "trained_share": trained / total,
        "stages": progress.stages,
    }
    return report
