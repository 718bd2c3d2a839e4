"""The verb `unspool eval`: measures, then writes the report, the model card, and what its flags ask for."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unspool.bench.report import STDOUT, add_report_flags, check_report_flags
from unspool.errors import UserError
from unspool.loading import load
from unspool_conversion.evaluation.corpus import read_corpus
from unspool_conversion.evaluation.harness import check_harness
from unspool_conversion.evaluation.plot import draw_evaluation, drawable
from unspool_conversion.evaluation.study import DEFAULT_TASKS, GREEDY_TOKENS, TASKS, Study, reach, run_harness
from unspool_conversion.evaluation.tables import describe_evaluation
from unspool_conversion.evaluation.variants import make_rows
from unspool_conversion.evaluation.verdict import warn_of_documents, warn_of_likelihood
from unspool_conversion.reports import load_report, replace_file, save_report, write_model_card
from unspool_conversion.verify import load_teacher_of


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to measure, on which text. Distances are in windows."""

    model: Path
    teacher: str
    text: Path
    sequences: int = 8
    length: int = 2048
    tasks: tuple[str, ...] = DEFAULT_TASKS
    distances: tuple[float, ...] = (2.0, 4.0, 8.0)
    trials: int = 16
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Raises UserError for values that make no sense."""
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UserError(f"--tasks: there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
        lowest = {"sequences": 2, "length": 2, "trials": 2, "lm_eval_limit": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
        if not self.distances or not all(1.0 <= distance <= 1024.0 for distance in self.distances):
            raise UserError("--distances are windows between facts and question, each from 1 to 1024")


def add_eval(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments; what it returns runs the verb."""
    defaults = EvaluationOptions
    parser.add_argument("model", type=Path, help="directory that `unspool convert` or `unspool distill` wrote")
    parser.add_argument("--teacher", required=True, help="what it was converted from: directory, hub id or GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="held-out text: .txt or .jsonl (.gz), many documents")
    _add_number(parser, "--sequences", defaults.sequences, "texts to score")
    _add_number(parser, "--length", defaults.length, "tokens of each")
    parser.add_argument("--tasks", type=_names, default=DEFAULT_TASKS, help=f"comma-separated, of {','.join(TASKS)}")
    parser.add_argument(
        "--distances", type=_numbers, default=defaults.distances, help="of needle and mqar, in windows (default: 2,4,8)"
    )
    _add_number(parser, "--trials", defaults.trials, "texts of needle and of mqar at each distance")
    parser.add_argument("--lm-eval", type=_names, default=(), metavar="TASKS", help="also these of lm-eval")
    parser.add_argument("--lm-eval-limit", type=int, metavar="N", help="only the first examples of each lm-eval task")
    parser.add_argument("--device", default=defaults.device, help="(default: %(default)s)")
    add_report_flags(parser, plot=False)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of nll by position, needle and mqar")
    return run_eval


def run_eval(arguments: argparse.Namespace) -> int:
    """Exit code 0 whatever was found; warnings go to standard error and into the report."""
    options = EvaluationOptions(**{name: getattr(arguments, name) for name in EvaluationOptions.__dataclass_fields__})
    options.check()
    check_report_flags(arguments)
    if arguments.plot is not None and not drawable(options.tasks):
        raise UserError("--plot draws nll, needle and mqar: name one of them in --tasks")
    evaluation = evaluate(options)
    record = json.dumps(evaluation, indent=2, allow_nan=False) + "\n"
    sys.stdout.write(record if arguments.json == STDOUT else describe_evaluation(evaluation))
    if arguments.json not in (None, STDOUT):
        replace_file(arguments.json, lambda file: file.write_text(record, encoding="utf-8"))
    if arguments.plot is not None:
        replace_file(arguments.plot, lambda file: draw_evaluation(evaluation, file))
    for warning in evaluation["warnings"]:
        sys.stderr.write(f"unspool eval: WARNING: {warning}\n")
    return 0


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Measures in float32, stores the result beside the model in place of an earlier one, and returns it.

    Raises UserError when a model or the text cannot be read, or the text is too short for what is asked.
    """
    report = load_report(options.model)
    if options.lm_eval:
        check_harness(options.lm_eval)
    study = open_study(options)
    evaluation: dict[str, Any] = {
        "text": options.text.name,
        "sequences": study.corpus.sequences.shape[0],
        "length": options.length,
        "documents": study.corpus.num_documents,
        "sizes": study.rows.describe(),
        "left_out": dict(study.rows.left_out),
        "warnings": warn_of_documents(study.corpus.num_documents, study.corpus.sequences.shape[0]),
    }
    evaluation |= {task: TASKS[task](study) for task in TASKS if task in options.tasks}
    if options.lm_eval:
        evaluation["lm_eval"] = run_harness(study, options.lm_eval, options.lm_eval_limit)
    if "nll" in evaluation:
        evaluation["warnings"] += warn_of_likelihood(evaluation["nll"])
    report["evaluation"] = evaluation
    save_report(options.model, report)
    write_model_card(options.model, report)
    return evaluation


def open_study(options: EvaluationOptions) -> Study:
    """Loads the models and the text."""
    loaded = load(options.model, dtype=torch.float32, device=options.device)
    _check_length(options, loaded.model.config.near_tokens)
    corpus = read_corpus(options.text, loaded.tokenizer, options.sequences, options.length)
    teacher = load_teacher_of(loaded, options.teacher)
    nn.Module.to(teacher, options.device)
    rows = make_rows(teacher, loaded.model)
    window = reach(rows)[0]
    distances = tuple(round(distance * window) for distance in options.distances)
    return Study(rows, loaded.tokenizer, options.text, corpus, distances, options.trials)


def _check_length(options: EvaluationOptions, near_tokens: int) -> None:
    least = near_tokens + 2 + (GREEDY_TOKENS if "greedy" in options.tasks else 0)
    if options.length < least:
        raise UserError(
            f"--length {options.length} hardly leaves the near set of {near_tokens} tokens, where the model is its "
            f"teacher: use at least {least}, better several times that"
        )


def _add_number(parser: argparse.ArgumentParser, flag: str, default: int, what: str) -> None:
    parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 2,4,8") from error
