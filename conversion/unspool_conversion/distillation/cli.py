"""The verb `distill`: arguments to options, how to go on after an interrupt, and what a finished run says."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unspool_conversion.distillation.distill import DistillOptions, distill
from unspool_conversion.distillation.recipe_files import read_recipe, shipped_recipes
from unspool_conversion.distillation.run import Interrupted


def add_distill(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments; returns the function that runs it and gives the exit code."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory that `unspool convert` wrote")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write")
    parser.add_argument("--teacher", required=True, metavar="SRC", help="what MODEL was converted from")
    parser.add_argument(
        "--recipe", required=True, metavar="NAME_OR_FILE", help=f"{', '.join(shipped_recipes())}, or a .yaml file"
    )
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        metavar="SPEC",
        help='.txt, .jsonl with "text" or "messages" (each also .gz), or datasets:NAME[:SPLIT]; may be repeated',
    )
    parser.add_argument("--seed", type=_parse_seed, help="(default: the recipe's)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a converted model")
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--checkpoint-seconds",
        type=_parse_seconds,
        default=60.0,
        metavar="N",
        help="between two states kept; 0 keeps every step's (default: %(default)s)",
    )
    return run_distill


def run_distill(arguments: argparse.Namespace) -> int:
    """Trains. Raises UserError for what the user can put right; an interrupt leaves a run that can be resumed."""
    recipe = read_recipe(arguments.recipe)
    options = DistillOptions(
        model=arguments.model,
        destination=arguments.destination,
        teacher=arguments.teacher,
        recipe=recipe if arguments.seed is None else replace(recipe, seed=arguments.seed),
        texts=tuple(arguments.text),
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        checkpoint_seconds=arguments.checkpoint_seconds,
    )
    try:
        report = distill(options)
    except Interrupted:
        sys.stderr.write(f"\nstopped; to continue:\n  {_resume_command(arguments)}\n")
        raise
    sys.stdout.write(_summary(arguments.destination, report["distillation"]))
    return 0


def _parse_seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _resume_command(arguments: argparse.Namespace) -> str:
    words = ["unspool", "distill", arguments.model, arguments.destination, "--teacher", arguments.teacher]
    words += ["--recipe", arguments.recipe, *(word for text in arguments.text for word in ("--text", text))]
    words += [] if arguments.seed is None else ["--seed", arguments.seed]
    words += [] if arguments.device is None else ["--device", arguments.device]
    words += ["--overwrite"] if arguments.overwrite else []
    return shlex.join(map(str, [*words, "--resume"]))


def _summary(destination: Path, distillation: dict[str, Any]) -> str:
    lines = [
        f"{destination}: {distillation['trained_parameters']:,} parameters trained "
        f"({distillation['trained_share']:.1%} of the model's) on {distillation['tokens']:,} tokens "
        f"in {distillation['seconds']:,.0f} s"
    ]
    for number, stage in enumerate(distillation["stages"], start=1):
        lines.append(f"stage {number}, {stage['kind']}: {_stage_summary(stage)}")
    return "\n".join(lines) + "\n"


def _stage_summary(stage: dict[str, Any]) -> str:
    if stage["kind"] == "bank":
        return _bank_summary([layer for layer in stage.get("layers", []) if "bank_aging" in layer])
    if stage["kind"] != "layerwise":
        return f"held-out loss {stage['held_out_before']:.4g} before, {stage['held_out_after']:.4g} after"
    fitted = [layer for layer in stage["layers"] if "error_after" in layer]
    if not fitted:
        return "no layer had anything to fit"
    before, after = (sum(layer[key] for layer in fitted) / len(fitted) for key in ("error_before", "error_after"))
    return f"{len(fitted)} layers fitted, mean error {before:.4g} before, {after:.4g} after"


def _bank_summary(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return "no layer has a bank"
    ratio = sum(layer["bank_error_of_longer_window"] for layer in layers) / len(layers)
    return f"{len(layers)} layers fitted, mean error {ratio:.4g} of a longer window's"
