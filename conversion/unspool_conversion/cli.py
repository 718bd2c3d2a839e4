"""The verb `convert`: arguments to options, progress bars, and the account that a dry run prints."""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn, get_args

from tqdm import tqdm

from unspool.executor import Quant
from unspool.mixer_spec import PRESETS, FeatureMap, Gate, Join, StateHeads
from unspool_conversion.convert import ConversionResult, Progress, convert, prepare
from unspool_conversion.estimates import estimate_seconds
from unspool_conversion.options import CalibrationOptions, ConvertOptions, OutputDtype, PerLayer, parse_per_layer
from unspool_conversion.plan import ConversionPlan

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
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
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="apply what `unspool distill` trained, instead of calibrating"
    )
    return run_convert


def run_convert(arguments: argparse.Namespace) -> int:
    """Converts, or prints what a conversion would do. Raises UserError for what the user can put right."""
    options = _options(arguments)
    if arguments.dry_run:
        sys.stdout.write(_account(prepare(options).plan, options))
        return 0
    # A polite kill cleans up as an interrupt does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(_Bar("calibrate", "layer")) as calibrated, closing(_Bar("write", "B")) as written:
            result = convert(options, Progress(calibrated=calibrated.move_to, written=written.move_to))
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.stdout.write(_summary(result))
    return 0


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
        dtype=arguments.dtype,
        quant=arguments.quant,
        max_shard_bytes=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        calibration=calibration,
        adapter=arguments.adapter,
    )


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _SIZE_UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 2GB")
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


class _Bar:
    """A progress bar that appears with the first step."""

    def __init__(self, description: str, unit: str) -> None:
        self._options = {"desc": description, "unit": unit, "unit_scale": unit == "B", "file": sys.stderr}
        self._bar: tqdm[NoReturn] | None = None

    def move_to(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, **self._options)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _account(plan: ConversionPlan, options: ConvertOptions) -> str:
    accounting, sizes = plan.accounting(), plan.sizes()
    seconds = estimate_seconds(plan, options.calibration.num_tokens)
    lines = [
        ("source tensors", f"{accounting['source_tensors']:,}"),
        ("  used", f"{accounting['used']:,}"),
        ("  dropped", f"{len(accounting['dropped']):,}"),
        *((f"    {name}", reason) for name, reason in accounting["dropped"].items()),
        ("destination tensors", f"{accounting['destination_tensors']:,}"),
        ("  from the source", f"{accounting['used']:,}"),
        ("  new", f"{len(accounting['new']):,}"),
        ("parameters", f"{sizes['parameters']:,}"),
        ("  new", f"{sizes['new_parameters']:,}"),
        ("weights", f"{sizes['weight_bytes']:,} bytes, {sizes['dtype'] if plan.quant == 'none' else plan.quant}"),
        ("state per session", f"{sizes['state_bytes_per_session']:,} bytes at any length"),
        ("teacher's cache", f"{sizes['teacher_cache_bytes_per_token']:,} bytes per token"),
        ("exact up to", "any length" if plan.exact_tokens is None else f"{plan.exact_tokens:,} tokens"),
        ("time", f"about {seconds:,.0f} s, an estimate"),
    ]
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:<{width}}{value}\n" for name, value in lines)


def _summary(result: ConversionResult) -> str:
    sizes = result.report["sizes"]
    return (
        f"{result.destination}: {sizes['parameters']:,} parameters ({sizes['new_parameters']:,} new), "
        f"{sizes['state_bytes_per_session']:,} bytes of state per session\n"
    )
