"""The verb `convert`: arguments to options, progress bars, and how to go on after an interrupt."""

import argparse
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn, get_args

from tqdm import tqdm

from unspool.executor import Quant
from unspool.mixer_spec import PRESETS, FeatureMap, Gate, Join, StateHeads
from unspool.sizes import parse_size
from unspool_conversion.conversion_summary import describe_plan, describe_result
from unspool_conversion.convert import ConversionResult, Progress, convert, prepare
from unspool_conversion.kept_softmax import LayerChoice, parse_layer_choice
from unspool_conversion.options import CalibrationOptions, ConvertOptions, OutputDtype, PerLayer, parse_per_layer
from unspool_conversion.shipped_adapters import find_adapter, shipped_adapters
from unspool_conversion.trained_conversion import (
    TrainingOptions,
    check_training,
    convert_and_train,
    work_directory,
)
from unspool_conversion.training_arguments import add_training_arguments, training_options

_OVERRIDES = ("join", "gate", "feature_map", "state_heads")


def add_convert(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments; returns the function that runs it and gives the exit code."""
    parser.add_argument("source", metavar="SRC", help="HuggingFace directory, hub id, or .gguf file")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype", choices=get_args(OutputDtype), default="auto", help="of the weights (default: source's)"
    )
    parser.add_argument(
        "--quant",
        choices=get_args(Quant),
        default="none",
        help="format of the weights on disk: bf16, fp16, or integers with a scale for every 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", type=_parse_size, default=2 * 10**9, metavar="SIZE", help="per weight file, like 2GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a converted model")
    parser.add_argument("--dry-run", action="store_true", help="print the account of the conversion, write nothing")
    _add_mixer_arguments(parser)
    _add_calibration_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR|NAME",
        help="apply what `unspool distill` trained, instead of calibrating, to the layers that it was trained for; "
        f"shipped: {', '.join(shipped_adapters())}",
    )
    return run_convert


def run_convert(arguments: argparse.Namespace) -> int:
    """Converts, or prints what a conversion would do. Raises UserError for what the user can put right; an interrupt
    while a recipe trains leaves a run that can be resumed."""
    options, training = _options(arguments), training_options(arguments)
    if arguments.dry_run:
        prepared = prepare(options)
        if training is not None:
            check_training(training, prepared)
        sys.stdout.write(describe_plan(prepared.plan, options, training))
        return 0
    # A polite kill cleans up as an interrupt does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(_Bar("calibrate", "layer")) as calibrated, closing(_Bar("write", "B")) as written:
            result = _convert(options, training, Progress(calibrated=calibrated.move_to, written=written.move_to))
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.stdout.write(describe_result(result))
    return 0


def _convert(options: ConvertOptions, training: TrainingOptions | None, progress: Progress) -> ConversionResult:
    if training is None:
        return convert(options, progress)
    try:
        return convert_and_train(options, training, progress)
    except KeyboardInterrupt:
        if work_directory(options.destination.expanduser()).exists():
            sys.stderr.write("\nstopped; the same command with --resume goes on from there\n")
        raise


def _add_mixer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "layers", "--window, --sinks and --bank take 256, or exceptions by layer: 256,0-3=512,7=64"
    )
    group.add_argument("--preset", choices=tuple(PRESETS), default="disjoint", help="(default: %(default)s)")
    group.add_argument("--join", choices=get_args(Join), help="how near and far parts join")
    group.add_argument("--gate", choices=get_args(Gate), help="what decides how fast the state forgets")
    group.add_argument("--feature-map", choices=get_args(FeatureMap), help="of the state's keys and queries")
    group.add_argument("--state-heads", choices=get_args(StateHeads), help="one state per key-value or query head")
    group.add_argument("--window", type=_parse_per_layer, default=PerLayer(None, ()), help="tokens kept exactly")
    group.add_argument("--sinks", type=_parse_per_layer, default=PerLayer(None, ()), help="first tokens kept exactly")
    group.add_argument(
        "--bank",
        type=_parse_per_layer,
        default=PerLayer(None, ()),
        help="tokens beyond the window kept exactly, those that the teacher is likeliest to need",
    )
    group.add_argument(
        "--keep-softmax",
        type=_parse_layer_choice,
        metavar="LAYERS",
        help="layers that keep the source's full attention, every:8 or 0,15,29; sessions then take memory for every "
        "token that these can see",
    )
    group.add_argument(
        "--softmax-capacity",
        type=_parse_count,
        metavar="TOKENS",
        help="that those layers see; from there on they slide (default: what the source was made for)",
    )


def _add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = CalibrationOptions()
    group = parser.add_argument_group("calibration")
    group.add_argument("--no-calibrate", action="store_true", help="leave the added parameters at their initial values")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=".txt or .jsonl, also gzipped (default: a text that is shipped)",
    )
    group.add_argument(
        "--calibration-sequences",
        type=_parse_count,
        default=defaults.sequences,
        metavar="N",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--calibration-length",
        type=_parse_count,
        default=defaults.length,
        metavar="TOKENS",
        help="of each sequence; several times the window (default: %(default)s)",
    )


def _options(arguments: argparse.Namespace) -> ConvertOptions:
    overrides = {name: getattr(arguments, name) for name in _OVERRIDES if getattr(arguments, name) is not None}
    calibration = CalibrationOptions(
        enabled=not arguments.no_calibrate and arguments.adapter is None,
        text=arguments.calibration,
        sequences=arguments.calibration_sequences,
        length=arguments.calibration_length,
    )
    return ConvertOptions(
        source=arguments.source,
        destination=arguments.destination,
        revision=arguments.revision,
        preset=arguments.preset,
        overrides=overrides,
        window=arguments.window,
        sinks=arguments.sinks,
        bank=arguments.bank,
        keep_softmax=arguments.keep_softmax,
        softmax_capacity=arguments.softmax_capacity,
        dtype=arguments.dtype,
        quant=arguments.quant,
        max_shard_bytes=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        calibration=calibration,
        adapter=None if arguments.adapter is None else find_adapter(arguments.adapter),
    )


def _parse_size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < 1:
        raise argparse.ArgumentTypeError("must be at least a byte")
    return size


def _parse_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count between 1 and {1 << 20}")
    return int(text)


def _parse_per_layer(text: str) -> PerLayer:
    try:
        return parse_per_layer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_layer_choice(text: str) -> LayerChoice:
    try:
        return parse_layer_choice(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Bar:
    """A progress bar that appears with the first step and is left alone after the last one."""

    def __init__(self, description: str, unit: str) -> None:
        self._options = {"desc": description, "unit": unit, "unit_scale": unit == "B", "file": sys.stderr}
        self._bar: tqdm[NoReturn] | None = None

    def move_to(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, **self._options)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
