"""The files that say what a converted model is and how it was made: `conversion_report.json` and the model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unspool.errors import UserError
from unspool_conversion.evaluation.tables import describe_evaluation
from unspool_conversion.kept_softmax import KeptSoftmax, kept_softmax
from unspool_conversion.markdown import markdown_table

REPORT = "conversion_report.json"
MODEL_CARD = "README.md"
SCHEMA_VERSION = 1


def save_report(directory: Path, report: dict[str, Any]) -> None:
    """Writes the report of a converted model, replacing the old one in one step."""
    text = json.dumps({"schema_version": SCHEMA_VERSION} | report, indent=2, sort_keys=False, allow_nan=False) + "\n"
    _replace_text(directory / REPORT, text)


def load_report(directory: Path) -> dict[str, Any]:
    """The report of a converted model. Raises UserError when there is none, or one of another schema."""
    path = directory / REPORT
    if not path.is_file():
        raise UserError(f"{directory} has no {REPORT}; pass a directory that `unspool convert` wrote")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); convert the model again") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version!r} and this version reads {SCHEMA_VERSION}; convert again")
    assert isinstance(report, dict)
    return report


def write_model_card(directory: Path, report: dict[str, Any]) -> None:
    """Writes the model card from a report.

    Its measurements are `report["verification"]`, which `unspool verify` adds, and `report["evaluation"]`, which
    `unspool eval` adds.
    """
    sections = (
        _front_matter(report),
        _introduction(report),
        _layers_section(report["linearize"]),
        _sizes_section(report["sizes"], kept_softmax(report["linearize"])),
        _calibration_section(report["calibration"]),
        *([_training_section(report["distillation"])] if "distillation" in report else []),
        *([f"## Training\n\nThe adapter `{report['adapter']}` was applied.\n"] if "adapter" in report else []),
        _measurements_section(report.get("verification")),
        _evaluation_section(report.get("evaluation")),
        _use_section(),
    )
    _replace_text(directory / MODEL_CARD, "\n".join(sections))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, then puts it in its place: there is the whole new file or the old one."""
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        write(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def _front_matter(report: dict[str, Any]) -> str:
    source = report["source"]
    fields = {"library_name": "unspool", "pipeline_tag": "text-generation"}
    if "revision" in source:
        fields["base_model"] = source["source"]
    if "license" in source:
        fields["license"] = source["license"]
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "tags: [unspool, recurrent, linear-attention]", "---", ""])


def _introduction(report: dict[str, Any]) -> str:
    source = report["source"]
    origin = source["source"] if "revision" in source else Path(source["source"]).name
    files = markdown_table(
        ["file", "bytes", "SHA-256"],
        [[file["name"], file["bytes"], file["sha256"]] for file in source["files"]],
    )
    kept = kept_softmax(report["linearize"])
    kind = "gated recurrent model" if kept is None else "hybrid of gated recurrent and softmax layers"
    return (
        f"# {report['name']}\n\n"
        f"A {kind}, converted from `{origin}` ({report['architecture']}, {source['format']}) by Unspool "
        f"{report['unspool_version']} on {report['created']}. {_memory(report['sizes'], kept)} "
        f"{_exactness(report['exact_tokens'])}\n\n{files}"
    )


def _memory(sizes: dict[str, Any], kept: KeptSoftmax | None) -> str:
    if kept is None:
        return "Its memory and time per token do not grow with the length of the text."
    return (
        f"**It is not constant-memory**: the source model's full attention over {kept.capacity:,} tokens is kept in "
        f"{kept.names}. Every session takes {sizes['state_bytes_per_session']:,} bytes, enough for that "
        f"many, {sizes['softmax_bytes_per_session']:,} of them for this attention; time per token grows with the text "
        f"up to that length, and beyond it this attention sees the last {kept.capacity:,} tokens."
    )


def _exactness(tokens: int | None) -> str:
    if tokens is None:
        return "At every length it computes what the source model computes."
    if tokens == 0:
        return "It approximates the source model at every length."
    return f"Up to {tokens} tokens it computes what the source model computes; beyond them it approximates it."


def _layers_section(linearize: dict[str, Any]) -> str:
    exceptions = "".join(
        f"- layer {layer}: {', '.join(f'{name} {value}' for name, value in fields.items())}\n"
        for layer, fields in linearize["layers"].items()
    )
    settings = markdown_table(["setting", "value"], list(linearize["default"].items()))
    different = f"\nLayers that differ:\n\n{exceptions}" if exceptions else ""
    return f"## Layers\n\nPreset `{linearize['preset']}`.\n\n{settings}{different}"


def _sizes_section(sizes: dict[str, Any], kept: KeptSoftmax | None) -> str:
    quant = sizes.get("quant", "none")
    length = "at any length" if kept is None else f"sized for {kept.capacity:,} tokens"
    return "## Sizes\n\n" + markdown_table(
        ["", ""],
        [
            ["parameters", sizes["parameters"]],
            ["of these added by the conversion", sizes["new_parameters"]],
            ["bytes of weights", sizes["weight_bytes"]],
            ["dtype", sizes["dtype"]],
            *([["format of the weights on disk", quant]] if quant != "none" else []),
            [f"bytes of state per session, {length}", sizes["state_bytes_per_session"]],
            *([["of these for full attention", sizes["softmax_bytes_per_session"]]] if kept is not None else []),
            ["bytes of the source model's key-value cache per token", sizes["teacher_cache_bytes_per_token"]],
        ],
    )


def _calibration_section(calibration: dict[str, Any]) -> str:
    if not calibration["enabled"]:
        return "## Calibration\n\nNone: parameters that the conversion added have their initial values.\n"
    tokens, text, layers = calibration["tokens"], calibration["text"], calibration["layers"]
    fitted = "weight" if all(layer["half_life"] is None for layer in layers) else "weight and half-life"
    where = f"the far part's {fitted}, in {len(layers)} of the layers"
    return f"## Calibration\n\nFitted on {tokens} tokens of {text}: {where}.\n"


def _training_section(distillation: dict[str, Any]) -> str:
    recipe, trained = distillation["recipe"]["name"], distillation["trained_parameters"]
    return (
        f"## Training\n\nRecipe `{recipe}`, seed {distillation['seed']}: {trained:,} parameters "
        f"({distillation['trained_share']:.2%} of the model's) on {distillation['tokens']:,} tokens in "
        f"{distillation['seconds']:,.0f} s. `adapter/` holds what it added.\n"
    )


def _measurements_section(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "## Measurements\n\nNot verified yet: `unspool verify` compares the model with its source.\n"
    return "## Measurements\n\n" + describe_verification(verification)


def _evaluation_section(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nNot evaluated yet: `unspool eval` says what the state is worth.\n"
    return "## Evaluation\n\n" + describe_evaluation(evaluation)


def describe_verification(verification: dict[str, Any]) -> str:
    """The outcome of `unspool verify` in sentences and a table, as Markdown."""
    exactness = verification["exactness"]
    if "rounding" in verification:
        return _describe_rounding(verification["rounding"]) + _describe_splits(verification)
    near = (
        f"On {exactness['tokens']} tokens, which fit the near set, logits differ from the source model's by "
        f"{exactness['relative_difference']:.1e} of the largest{_greedy_text(exactness['same_greedy_tokens'])}"
    )
    claim = "." if exactness["claimed"] else " (this layer does not claim to be the source's)."
    return f"{near}{claim}{_describe_splits(verification)}"


def _describe_rounding(rounding: dict[str, Any]) -> str:
    return (
        f"Its weights are rounded to {rounding['format']}, so it does not claim to be the source model: on "
        f"{rounding['tokens']} tokens, which fit the near set, its predictions diverge from the source model's by "
        f"{rounding['divergence']:.2g} nats a token (Kullback-Leibler divergence, computed in float32)."
    )


def _describe_splits(verification: dict[str, Any]) -> str:
    chunking, table = verification["chunking"], verification["table"]
    split = max(chunking["by_steps"], chunking["by_uneven_chunks"])
    return (
        f" Reading {chunking['tokens']} tokens at once, one by one or in uneven chunks gives logits "
        f"within {split:.1e}.\n\n{verification['sequences']} texts of {verification['length']} tokens from "
        f"{verification['text']}:\n\n{markdown_table(table['columns'], table['rows'])}"
    )


def _greedy_text(same: bool | None) -> str:
    return "" if same is None else f", and greedy text is {'the same' if same else 'different'}"


def _use_section() -> str:
    return (
        "## Use\n\n"
        "```sh\nunspool chat DIRECTORY\n```\n\n"
        "```python\n"
        "import unspool\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(DIRECTORY)\n"
        "```\n"
    )
