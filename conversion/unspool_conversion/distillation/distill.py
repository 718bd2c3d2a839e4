"""One training run from a converted model to a better one: checks, training, writing; resumable until it is whole."""

import hashlib
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import unspool
from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.loading import LoadedModel, load
from unspool_conversion.distillation.adapter import describe_base, fingerprint
from unspool_conversion.distillation.bank_fit import run_bank
from unspool_conversion.distillation.corpus import Corpus, check_tokenizer, read_corpus
from unspool_conversion.distillation.end_to_end import run_end_to_end
from unspool_conversion.distillation.layerwise import run_layerwise
from unspool_conversion.distillation.output import StoredModel, write_output
from unspool_conversion.distillation.progress import has_checkpoint
from unspool_conversion.distillation.recipe import BankStage, LayerwiseStage, LogitsStage, Recipe
from unspool_conversion.distillation.run import Run, RunOptions
from unspool_conversion.distillation.student import Student, first_far_position
from unspool_conversion.distillation.teachers import SharedTeacher, SourceTeacher, Teacher
from unspool_conversion.reports import load_report
from unspool_conversion.sources import open_source
from unspool_conversion.staging import check_destination, staged_directory
from unspool_conversion.teacher_config import TeacherConfig, translate_config
from unspool_conversion.verify import load_teacher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """One training run. `checkpoint_seconds` is the time between two states kept; 0 keeps every step's."""

    model: Path
    destination: Path
    teacher: str
    recipe: Recipe
    texts: tuple[str, ...]
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    checkpoint_seconds: float = 60.0


def run_directory(destination: Path) -> Path:
    """Where a run keeps itself until its destination is whole."""
    return destination.with_name(f"{destination.name}.distilling")


def distill(options: DistillOptions) -> dict[str, Any]:
    """Trains, writes `options.destination`, and returns its report.

    Whatever stops it leaves a directory beside the destination from which it can be resumed, and the destination as it
    was. Raises UserError for what the user can put right, and Interrupted when asked to stop.
    """
    destination = options.destination.expanduser()
    directory = run_directory(destination)
    _check_fresh(directory, resume=options.resume)
    report = load_report(options.model)
    if destination.resolve() == options.model.resolve():
        raise UserError(f"{destination} is the model to train from; choose another destination")
    if "distillation" in report:
        raise UserError(f"{options.model} is already distilled; start from the model that `unspool convert` wrote")
    num_bytes = StoredModel(options.model).num_bytes
    check_destination(destination, num_bytes, overwrite=options.overwrite)
    loaded = load(options.model, dtype=torch.float32, device=options.device)
    if loaded.stored_as is not None:
        raise UserError(
            f"{options.model} is stored as {loaded.stored_as}; convert without --quant, distill that, and convert "
            "again with --adapter and --quant"
        )
    recipe = _within_context(options.recipe, loaded.model.config)
    run = _prepare(replace(options, recipe=recipe), loaded, report)
    try:
        with run.stopping_politely():
            _train(run)
    finally:
        run.log.refresh_plot(now=True)
        run.log.close()
    with staged_directory(destination, num_bytes, overwrite=options.overwrite) as staging:
        report = write_output(staging, destination.name, options.model, loaded.model.config, run)
    shutil.rmtree(directory)
    return report


def _check_fresh(directory: Path, *, resume: bool) -> None:
    if resume and not has_checkpoint(directory):
        raise UserError(f"{directory} holds no run to resume; leave --resume out")
    if not resume and has_checkpoint(directory):
        raise UserError(f"{directory} holds a run that was stopped; pass --resume to continue it, or remove it")


def _within_context(recipe: Recipe, config: UnspoolConfig) -> Recipe:
    """Sequences no longer than the teacher was made for. Raises UserError when no layer has far tokens in them."""
    length = min(recipe.length, config.max_position_embeddings)
    if length < recipe.length:
        _log.warning("the teacher reads %d tokens; sequences are cut from %d to that", length, recipe.length)
    first = min(first_far_position(spec) for spec in config.mixer_specs())
    if first >= length - 1:
        raise UserError(
            f"sequences of {length} tokens never leave a near set of {first}, so there is nothing to train; use a "
            "recipe with a larger length, or convert with a smaller --window"
        )
    return replace(recipe, length=length)


def _prepare(options: DistillOptions, loaded: LoadedModel, report: dict[str, Any]) -> Run:
    """Everything that a run needs, checked against each other."""
    recipe, config = options.recipe, loaded.model.config
    teacher_config = translate_config(open_source(options.teacher).config)
    check_teacher(options.teacher, teacher_config, config)
    check_tokenizer(loaded.tokenizer, config.vocab_size)
    corpus = read_corpus(options.texts, loaded.tokenizer, recipe.sequences, recipe.length, recipe.held_out)
    student = Student(loaded.model, recipe.lora, teacher_config.windows, recipe.seed)
    identity = {
        "recipe": recipe.to_dict(),
        "model": [fingerprint(describe_base(config)), report["created"], str(options.model.resolve())],
        "teacher": options.teacher,
        "text": _text_hash(corpus),
        "version of Unspool": unspool.__version__,
    }
    run_options = RunOptions(
        directory=run_directory(options.destination.expanduser()),
        identity=identity,
        resume=options.resume,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    return Run(run_options, recipe, student, corpus, _teacher(options, student))


def check_teacher(name: str, teacher: TeacherConfig, config: UnspoolConfig) -> None:
    """Raises UserError, naming the field, when a model with this configuration does not come from that teacher."""
    for field, ours in describe_base(config).items():
        if field in teacher.fields and teacher.fields[field] != ours:
            raise UserError(
                f"--teacher {name} has {field} {teacher.fields[field]!r} and the model {ours!r}; name the model that "
                "it was converted from"
            )


def _teacher(options: DistillOptions, student: Student) -> Teacher:
    recipe = options.recipe
    if recipe.teacher == "shared" or not _asks_teacher(recipe):
        return SharedTeacher(student)
    source: Any = load_teacher(options.teacher)
    return SourceTeacher(source.to(student.device))


def _asks_teacher(recipe: Recipe) -> bool:
    return any(isinstance(stage, LogitsStage) and stage.cross_entropy < 1 for stage in recipe.stages)


def _text_hash(corpus: Corpus) -> str:
    digest = hashlib.sha256(corpus.tokens.numpy().tobytes())
    digest.update(corpus.trained.numpy().tobytes())
    return digest.hexdigest()


def _train(run: Run) -> None:
    """The stages that are left, each from where the progress stands."""
    progress, stages = run.progress, run.recipe.stages
    while progress.stage < len(stages):
        stage = stages[progress.stage]
        if len(progress.stages) == progress.stage:
            progress.stages.append({"kind": stage.kind})
        if isinstance(stage, BankStage):
            run_bank(run, stage)
        elif isinstance(stage, LayerwiseStage):
            run_layerwise(run, stage)
        else:
            run_end_to_end(run, stage)
        run.finish_stage()
