"""One conversion from source to destination: plan, calibrate, write, describe; whole or not at all."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import unspool
from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool_conversion.calibration import Teacher, calibrate, calibrated_specs, initial_parameters
from unspool_conversion.distillation.adapter import apply_adapter, changes_teacher
from unspool_conversion.mapped_tensors import MappedTensors, check_tied_head
from unspool_conversion.options import CalibrationOptions, ConvertOptions
from unspool_conversion.plan import ConversionPlan, plan_conversion
from unspool_conversion.reports import save_report, write_model_card
from unspool_conversion.sources import open_source
from unspool_conversion.staging import check_destination, staged_directory
from unspool_conversion.tensor_source import TensorSource
from unspool_conversion.texts import calibration_tokens, text_name
from unspool_conversion.writer import split_into_shards, write_shards

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedConversion:
    """An opened source and the account of its conversion."""

    source: TensorSource
    plan: ConversionPlan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Whom to tell: `calibrated` of layers done and all layers, `written` of bytes done and all bytes."""

    calibrated: Callable[[int, int], None]
    written: Callable[[int, int], None]


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion."""

    destination: Path
    plan: ConversionPlan
    report: dict[str, Any]


@dataclass(frozen=True)
class _NewParameters:
    tensors: dict[str, Tensor]
    report: dict[str, Any]


def prepare(options: ConvertOptions) -> PlannedConversion:
    """Opens the source and accounts for every tensor; writes nothing. Raises UserError when it cannot be converted."""
    source = open_source(options.source, options.revision)
    return PlannedConversion(source, plan_conversion(source, options))


SILENT = Progress(calibrated=lambda done, total: None, written=lambda done, total: None)


def convert(options: ConvertOptions, progress: Progress = SILENT) -> ConversionResult:
    """Writes the converted model to `options.destination`.

    Raises UserError for an input that cannot be converted, a destination that may not be replaced, or a full disk;
    then, as after any failure, the destination is as it was before.
    """
    prepared = prepare(options)
    check_conversion(options, prepared)
    destination, plan = options.destination.expanduser(), prepared.plan
    with staged_directory(destination, plan.num_bytes, overwrite=options.overwrite) as staging:
        report = {"name": destination.name} | write_model(staging, options, prepared, progress)
        save_report(staging, report)
        write_model_card(staging, report)
    return ConversionResult(destination, plan, report)


def check_conversion(options: ConvertOptions, prepared: PlannedConversion) -> None:
    """Raises UserError when the destination may not be written, or holds the source; or when a tied head is none."""
    destination = options.destination.expanduser()
    _check_apart(prepared.source, destination)
    check_destination(destination, prepared.plan.num_bytes, overwrite=options.overwrite)
    check_tied_head(prepared.source, prepared.plan)


def write_model(
    directory: Path, options: ConvertOptions, prepared: PlannedConversion, progress: Progress
) -> dict[str, Any]:
    """Fills the directory with the converted model, all but its description; returns its report, which has no name."""
    source, plan = prepared.source, prepared.plan
    mapped = MappedTensors(source, plan)
    source.write_side_files(directory)
    new = _new_parameters(options, plan, mapped, load_tokenizer(directory, plan), progress)
    load: Callable[[str], Tensor] = partial(_tensor, new=new, mapped=mapped)
    if options.adapter is not None:
        load = apply_adapter(options.adapter, plan.config, load)
    write_shards(directory, split_into_shards(plan.tensors, options.max_shard_bytes), load, progress.written)
    plan.config.save_pretrained(directory)
    report = _report(source, plan, new.report)
    return report if options.adapter is None else report | _adapter_report(options.adapter, plan)


def _check_apart(source: TensorSource, destination: Path) -> None:
    for path in source.weight_files():
        if destination.resolve() in (path.resolve(), *path.resolve().parents, *path.absolute().parents):
            raise UserError(f"{destination} holds the source's {path.name}; choose another destination")


def load_tokenizer(directory: Path, plan: ConversionPlan) -> PreTrainedTokenizerBase:
    """Raises UserError when the directory has no tokenizer that can be loaded, or another model's."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"the source's tokenizer cannot be loaded: {error}") from error
    if (largest := max(tokenizer.get_vocab().values(), default=-1)) >= plan.config.vocab_size:
        raise UserError(
            f"the tokenizer has token {largest} and the model's vocab_size is {plan.config.vocab_size}; "
            "the two do not belong together"
        )
    return tokenizer


def _new_parameters(
    options: ConvertOptions,
    plan: ConversionPlan,
    mapped: MappedTensors,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> _NewParameters:
    if options.calibration.enabled and calibrated_specs(plan.config):
        tokens = calibration_tokens(_within_context(options.calibration, plan.config), tokenizer)
        teacher = Teacher(plan.config, mapped.load, plan.teacher_windows)
        calibration = calibrate(teacher, tokens, progress.calibrated)
        described = {"enabled": True, "text": text_name(options.calibration), "tokens": tokens.numel()}
        return _NewParameters(calibration.tensors, described | calibration.report)
    if options.calibration.enabled and options.calibration.text is not None:
        _log.warning("%s is not read: no layer of this conversion is calibrated", options.calibration.text)
    return _NewParameters(initial_parameters(plan.config), {"enabled": False})


def _within_context(options: CalibrationOptions, config: UnspoolConfig) -> CalibrationOptions:
    """Sequences no longer than the teacher was made for, with a warning when they have no far tokens."""
    length = min(options.length, config.max_position_embeddings)
    longest = max(spec.near_tokens for spec in calibrated_specs(config))
    if length <= longest:
        _log.warning(
            "calibration sequences of %d tokens never leave a near set of %d: those layers' states stay off; pass a "
            "larger --calibration-length or a smaller --window",
            length,
            longest,
        )
    return replace(options, length=length)


def _tensor(name: str, new: _NewParameters, mapped: MappedTensors) -> Tensor:
    return new.tensors[name] if name in new.tensors else mapped.load(name)


def _adapter_report(adapter: Path, plan: ConversionPlan) -> dict[str, Any]:
    exact_tokens = 0 if changes_teacher(adapter) else plan.exact_tokens
    return {"adapter": adapter.name, "exact_tokens": exact_tokens}


def _report(source: TensorSource, plan: ConversionPlan, calibration: dict[str, Any]) -> dict[str, Any]:
    return {
        "unspool_version": unspool.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source.provenance(),
        "architecture": plan.config.base_model_type,
        "linearize": plan.config.linearize,
        "constant_memory": plan.kept_softmax is None,
        "exact_tokens": plan.exact_tokens,
        "accounting": plan.accounting(),
        "sizes": plan.sizes(),
        "calibration": calibration,
    }
