"""The verb `unspool verify`: runs the checks, writes their result into the report and the model card."""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from unspool.errors import UserError
from unspool.loading import LoadedModel, load
from unspool.model import UnspoolForCausalLM
from unspool_conversion import verification
from unspool_conversion.evaluation.variants import window_only
from unspool_conversion.reports import describe_verification, load_report, save_report, write_model_card
from unspool_conversion.texts import CHARACTERS_PER_TOKEN, cut_documents, read_documents


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare, on which text."""

    model: Path
    teacher: str
    text: Path
    sequences: int
    length: int
    parity_tokens: int


def add_verify(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments; what it returns runs the verb."""
    parser.add_argument("model", type=Path, help="directory that `unspool convert` wrote")
    parser.add_argument("--teacher", required=True, help="what it was converted from: directory, hub id or GGUF file")
    parser.add_argument(
        "--text", type=Path, required=True, help="held-out text: .txt or .jsonl (.gz), not calibrated on"
    )
    parser.add_argument("--sequences", type=int, default=4, help="texts to score (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--parity-tokens", type=int, default=400, help="tokens of the step-against-chunk check (default: %(default)s)"
    )
    return run_verify


def run_verify(arguments: argparse.Namespace) -> int:
    """Exit code 0 when every check that the model claims passes, 1 when one fails."""
    options = VerifyOptions(
        **{name: getattr(arguments, name) for name in VerifyOptions.__dataclass_fields__},
    )
    if min(options.sequences, options.parity_tokens) < 1 or options.length < 2:
        raise UserError("--sequences and --parity-tokens must be at least 1, --length at least 2")
    result = verify(options)
    sys.stdout.write(describe_verification(result))
    return 0 if result["passed"] else 1


def verify(options: VerifyOptions) -> dict[str, Any]:
    """Runs the checks in float32, stores their result beside the model, and returns it. Of a quantised checkpoint they
    claim no exactness: its distance from the teacher is measured instead.

    Raises UserError when a model or the text cannot be read or the text is too short.
    """
    report = load_report(options.model)
    loaded = load(options.model, dtype=torch.float32)
    limit = options.sequences * options.length * CHARACTERS_PER_TOKEN
    sequences = cut_documents(read_documents(options.text, limit), loaded.tokenizer, options.sequences, options.length)
    teacher = load_teacher_of(loaded, options.teacher)
    result = {"text": options.text.name, "sequences": sequences.shape[0], "length": sequences.shape[1]}
    result |= _check(loaded.model, teacher, sequences[0], report["exact_tokens"], options.parity_tokens)
    if loaded.stored_as is not None:
        near = sequences[0][: loaded.model.config.near_tokens]
        divergence = verification.measure_divergence(loaded.model, teacher, near)
        result["rounding"] = {"format": loaded.stored_as, "tokens": near.shape[0], "divergence": divergence}
    result["table"] = _perplexities(loaded.model, teacher, sequences)
    report["verification"] = result
    save_report(options.model, report)
    write_model_card(options.model, report)
    return result


def load_teacher_of(loaded: LoadedModel, source: str) -> PreTrainedModel:
    """`load_teacher`, which also raises UserError for a teacher with another vocabulary than the converted model."""
    teacher = load_teacher(source)
    if teacher.config.vocab_size != loaded.model.config.vocab_size:
        raise UserError(f"--teacher {source} has another vocabulary than {loaded.path}; name its own teacher")
    return teacher


def load_teacher(source: str) -> PreTrainedModel:
    """transformers' own model in float32. Raises UserError when there is none."""
    path = Path(source)
    where, gguf = (str(path.parent), path.name) if path.suffix == ".gguf" else (source, None)
    try:
        teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher {source}: {error}") from error
    teacher.eval()
    return teacher


def _check(
    model: UnspoolForCausalLM, teacher: PreTrainedModel, tokens: Tensor, exact_tokens: int | None, parity_tokens: int
) -> dict[str, Any]:
    """The checks that pass or fail. `exact_tokens` is what the conversion claims; 0 claims nothing, None any length."""
    near = exact_tokens or model.config.near_tokens
    exactness = verification.check_exactness(model, teacher, tokens if exact_tokens is None else tokens[:near])
    chunking = verification.check_chunking(model, tokens[:parity_tokens])
    claimed = exact_tokens != 0
    return {
        "exactness": exactness._asdict() | {"claimed": claimed, "passed": exactness.passed},
        "chunking": chunking._asdict() | {"passed": chunking.passed},
        "passed": chunking.passed and (exactness.passed or not claimed),
    }


def _perplexities(model: UnspoolForCausalLM, teacher: PreTrainedModel, sequences: Tensor) -> dict[str, Any]:
    """The table of perplexities by position: each variant is built, scored and dropped before the next."""
    variants: dict[str, Callable[[], verification.Score]] = {
        "teacher": lambda: verification.score_teacher(teacher),
        "window-only": lambda: verification.score_converted(window_only(model)),
        "window-only, equal bytes": lambda: verification.score_converted(window_only(model, equal_bytes=True)),
        "converted": lambda: verification.score_converted(model),
    }
    rows: dict[str, Any] = {}
    with tqdm(total=len(variants) * sequences.shape[0], desc="perplexity", unit="text", file=sys.stderr) as bar:
        for name, build in variants.items():
            rows[name] = verification.perplexity_by_position(build(), sequences, bar.update)
            gc.collect()
    columns = ["perplexity at positions", *rows["teacher"]]
    return {"columns": columns, "rows": [[name, *row.values()] for name, row in rows.items()]}
