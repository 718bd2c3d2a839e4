"""A conversion that is trained in the same run: converted, put through a recipe's stages, and converted once more with
what these added. Until the destination is whole the run keeps itself beside it, and can be resumed from there.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unspool.errors import UserError
from unspool_conversion.convert import (
    SILENT,
    ConversionResult,
    PlannedConversion,
    Progress,
    check_conversion,
    convert,
    load_tokenizer,
    prepare,
    write_model,
)
from unspool_conversion.distillation.corpus import read_corpus
from unspool_conversion.distillation.distill import DistillOptions, distill, run_directory
from unspool_conversion.distillation.loss_log import LOG, PLOT
from unspool_conversion.distillation.output import ADAPTER
from unspool_conversion.distillation.progress import has_checkpoint
from unspool_conversion.distillation.recipe import BankStage, LayerwiseStage, Recipe, Stage
from unspool_conversion.distillation.student import first_far_position
from unspool_conversion.options import CalibrationOptions, ConvertOptions
from unspool_conversion.reports import load_report, replace_file, save_report, write_model_card
from unspool_conversion.staging import staged_directory
from unspool_conversion.tensor_source import TensorSource, read_json

_IDENTITY, _CONVERTED, _TRAINED = "conversion.json", "converted", "trained"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a conversion is trained. `checkpoint_seconds` is the time between two states kept; 0 keeps every step's."""

    recipe: Recipe
    texts: tuple[str, ...]
    device: str = "cpu"
    resume: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.texts:
            raise UserError(f"recipe {self.recipe.name!r} names no text to train on; pass --data")

    def num_tokens(self, num_layers: int) -> int:
        """Tokens that all stages read, by layer once for every layer, when nothing is cut short or skipped."""
        sequences = sum(_num_sequences(stage, self.recipe, num_layers) for stage in self.recipe.stages)
        return sequences * self.recipe.length


def _num_sequences(stage: Stage, recipe: Recipe, num_layers: int) -> int:
    if isinstance(stage, BankStage):
        training = recipe.sequences - recipe.held_out
        return num_layers * min(stage.sequences or training, training)
    return stage.steps * stage.batch * (num_layers if isinstance(stage, LayerwiseStage) else 1)


def work_directory(destination: Path) -> Path:
    """Where a trained conversion keeps itself until its destination is whole."""
    return destination.with_name(f"{destination.name}.converting")


def convert_and_train(
    options: ConvertOptions, training: TrainingOptions, progress: Progress = SILENT
) -> ConversionResult:
    """Writes the converted and trained model to `options.destination`.

    Whatever stops it leaves the destination as it was and, once the untrained model is whole, a directory beside it
    from which the run can be resumed. Raises UserError for what the user can put right, and Interrupted when training
    was asked to stop.
    """
    prepared = prepare(options)
    check_conversion(options, prepared)
    check_training(training, prepared)
    destination = options.destination.expanduser()
    with _kept(work_directory(destination), _identity(options, training), resume=training.resume) as work:
        if not (work / _TRAINED).exists():
            if not (work / _CONVERTED).exists():
                untrained = replace(options, destination=work / _CONVERTED, quant="none", overwrite=False)
                convert(untrained, replace(SILENT, calibrated=progress.calibrated))
            _train(work, training, prepared.source)
        # Its weights are in the trained model, and there may be no room for three.
        shutil.rmtree(work / _CONVERTED, ignore_errors=True)
        return _finish(options, prepared, work / _TRAINED, progress)


def check_training(training: TrainingOptions, prepared: PlannedConversion) -> None:
    """Raises UserError for what would stop the training of this conversion later: a text that cannot be read or is too
    short, a near set that no sequence leaves, a package that is missing."""
    recipe, config = training.recipe, prepared.plan.config
    if recipe.lora is not None and find_spec("peft") is None:
        raise UserError(
            f"recipe {recipe.name!r} has an adapter, which needs the package peft: pip install 'unspool[train]'"
        )
    length = min(recipe.length, config.max_position_embeddings)
    first = min(first_far_position(spec) for spec in config.mixer_specs())
    if first >= length - 1:
        raise UserError(
            f"sequences of {length} tokens never leave a near set of {first}, so there is nothing to train; use a "
            "recipe with a larger length, or a smaller --window"
        )
    with tempfile.TemporaryDirectory() as directory:
        prepared.source.write_side_files(Path(directory))
        tokenizer = load_tokenizer(Path(directory), prepared.plan)
    read_corpus(training.texts, tokenizer, recipe.held_out + 1, length, recipe.held_out)


@contextmanager
def _kept(work: Path, identity: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """The run's directory, which is gone when the block ends well, or before it holds anything to resume from."""
    _check_run(work, identity, resume=resume)
    missing = [parent for parent in work.parents if not parent.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity, indent=2)
        replace_file(work / _IDENTITY, lambda new: new.write_text(text, encoding="utf-8"))
        yield work
    except BaseException:
        if not (work / _CONVERTED).exists() and not (work / _TRAINED).exists():
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                for parent in missing:
                    parent.rmdir()
        raise
    shutil.rmtree(work)


def _check_run(work: Path, identity: dict[str, Any], *, resume: bool) -> None:
    if not (work / _IDENTITY).is_file():
        if resume:
            raise UserError(f"{work} holds no conversion to resume; leave --resume out")
        return
    if not resume:
        raise UserError(f"{work} holds a conversion that was stopped; pass --resume to continue it, or remove it")
    known = read_json(work / _IDENTITY)
    for name, value in identity.items():
        if known.get(name) != value:
            raise UserError(
                f"{work} is a conversion with another {name}; resume it with the one it had, or remove it to start "
                "again"
            )


def _identity(options: ConvertOptions, training: TrainingOptions) -> dict[str, Any]:
    """What makes a conversion the same one when it is resumed."""
    values = {name: value for name, value in asdict(options).items() if name not in ("destination", "overwrite")}
    values |= {"recipe": training.recipe.to_dict(), "data": training.texts}
    identity: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return identity


def _train(work: Path, training: TrainingOptions, source: TensorSource) -> None:
    distill(
        DistillOptions(
            model=work / _CONVERTED,
            destination=work / _TRAINED,
            teacher=_teacher(source),
            recipe=training.recipe,
            texts=training.texts,
            device=training.device,
            resume=has_checkpoint(run_directory(work / _TRAINED)),
            checkpoint_seconds=training.checkpoint_seconds,
        )
    )


def _teacher(source: TensorSource) -> str:
    """The opened source as a local path: a hub id alone would not say of which revision."""
    weights = source.weight_files()[0]
    return str(weights if source.format == "gguf" else weights.parent)


def _finish(
    options: ConvertOptions, prepared: PlannedConversion, trained: Path, progress: Progress
) -> ConversionResult:
    """Converts once more, with the adapter, in the format that was asked for; keeps the adapter and what is known of
    its training."""
    plan, destination = prepared.plan, options.destination.expanduser()
    with_adapter = replace(options, calibration=CalibrationOptions(enabled=False), adapter=trained / ADAPTER)
    with staged_directory(destination, plan.num_bytes, overwrite=options.overwrite) as staging:
        report = {"name": destination.name} | write_model(staging, with_adapter, prepared, progress)
        del report["adapter"]
        report |= {name: load_report(trained)[name] for name in ("calibration", "distillation")}
        shutil.copytree(trained / ADAPTER, staging / ADAPTER)
        for log in (LOG, PLOT):
            if (trained / log).is_file():
                shutil.copyfile(trained / log, staging / log)
        save_report(staging, report)
        write_model_card(staging, report)
    return ConversionResult(destination, plan, report)
