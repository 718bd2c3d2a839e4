"""An evaluation as Markdown, for the terminal and the model card."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unspool_conversion.evaluation.variants import CONVERTED
from unspool_conversion.markdown import markdown_table

Record = Mapping[str, float | None] | None

DIFFERENCES = {
    "converted minus window-only": "minus_window_only",
    "converted minus window-only of equal bytes": "minus_equal_bytes",
    "share of the gap to the teacher closed": "gap_closed",
}


def describe_evaluation(evaluation: Mapping[str, Any]) -> str:
    """Warnings first, then every table that was measured. Brackets hold 95 % intervals."""
    parts = [_warnings(evaluation["warnings"]), _settings(evaluation)]
    parts += [describe(evaluation[task]) for task, describe in DESCRIPTIONS.items() if task in evaluation]
    return "\n".join(part for part in parts if part)


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f"- **Warning**: {warning}.\n" for warning in warnings)


def _settings(evaluation: Mapping[str, Any]) -> str:
    sizes = markdown_table(
        ["row", "near set, bytes", "state, bytes", "window"],
        [
            [name, size["near_bytes"], size["state_bytes"], _windows(size["windows"])]
            for name, size in evaluation["sizes"].items()
        ],
    )
    left_out = "".join(f"\nNo row {name}: {reason}.\n" for name, reason in evaluation["left_out"].items())
    return (
        f"On {evaluation['sequences']} texts of {evaluation['length']} tokens from {evaluation['documents']} documents "
        f"of {evaluation['text']}, in float32. Brackets hold 95 % intervals, bootstrapped over documents where nothing "
        f"else is said. Bytes are a sequence's.\n\n{sizes}{left_out}"
    )


def _windows(windows: Sequence[int]) -> str:
    return str(windows[0]) if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"


def _likelihood(summary: Mapping[str, Any]) -> str:
    positions = list(summary["positions"])

    def table(title: str, field: str, digits: int) -> str:
        rows = [[name, *(cell(row[at][field], digits) for at in positions)] for name, row in summary["rows"].items()]
        return markdown_table([title, *positions], rows)

    converted = summary["rows"][CONVERTED]
    differences = markdown_table(
        ["nats a token", *positions],
        [[title, *(cell(converted[at][field], 4) for at in positions)] for title, field in DIFFERENCES.items()],
    )
    return (
        "### Likelihood by position\n\nA token counts where it is predicted from; "
        f"`far` is every position beyond the near set of {summary['near_tokens']} tokens.\n\n"
        + "\n".join(
            [
                table("negative log-likelihood, nats", "nll", 3),
                table("perplexity", "perplexity", 2),
                differences,
                table("KL divergence from the teacher, nats", "divergence", 4),
                table("same likeliest token as the teacher", "agreement", 3),
            ]
        )
    )


def _repetition(summary: Mapping[str, Any]) -> str:
    slices = list(summary["tokens"])
    counts = ", ".join(f"{count} {name}" for name, count in summary["tokens"].items())
    rows = [[name, *(cell(row[part]["perplexity"], 2) for part in slices)] for name, row in summary["rows"].items()]
    converted = summary["rows"][CONVERTED]
    differences = [
        [title, *(cell(converted[part][field], 4) for part in slices)] for title, field in DIFFERENCES.items()
    ]
    return (
        "### Tokens that recall\n\nTokens that complete a pair of tokens which the text had before, but not within the "
        f"near set, against the rest: {counts}.\n\n"
        f"{markdown_table(['perplexity', *slices], rows)}\n{markdown_table(['nats a token', *slices], differences)}"
    )


def _greedy(summary: Mapping[str, Any]) -> str:
    rows = [
        [name, cell(row["match"], 1), cell(row["minus_window_only"], 1), cell(row["minus_equal_bytes"], 1)]
        for name, row in summary["rows"].items()
    ]
    columns = [
        "greedy tokens that are the teacher's",
        f"of {summary['tokens']}",
        "minus window-only",
        "minus equal bytes",
    ]
    return f"### Greedy text\n\nAfter prompts of {summary['prompt_tokens']} tokens.\n\n{markdown_table(columns, rows)}"


def _needle(summary: Mapping[str, Any]) -> str:
    return "### Pass key\n\nOne key, told once, then asked for; the wrong answers are other numbers." + _recall(summary)


def _associations(summary: Mapping[str, Any]) -> str:
    text = "Several keys with a number each, then some asked for; the wrong answers are the other keys' numbers."
    return f"### Associative recall\n\n{text}{_recall(summary)}"


def _recall(summary: Mapping[str, Any]) -> str:
    distances = list(next(iter(summary["rows"].values())))

    def table(title: str, field: str, digits: int) -> str:
        rows = [[name, *(cell(row[at][field], digits) for at in distances)] for name, row in summary["rows"].items()]
        return markdown_table([title, *distances], rows)

    converted = summary["rows"][CONVERTED]
    fields = {"minus window-only": "margin_minus_window_only", "minus equal bytes": "margin_minus_equal_bytes"}
    differences = [[name, *(cell(converted[at][field], 3) for at in distances)] for name, field in fields.items()]
    return (
        f" {summary['trials']} texts a distance, {summary['questions_each']} questions each. Columns are the tokens "
        f"between facts and question; chance is {summary['chance']:.3f}.\n\n"
        + "\n".join(
            [
                table("right answer preferred", "accuracy", 2),
                table("right answer said", "exact", 2),
                table("nats above the best wrong answer", "margin", 2),
                markdown_table(["margin of the converted model, nats", *distances], differences),
            ]
        )
    )


def _mqar_training(summary: Mapping[str, Any]) -> str:
    if "left_out" in summary:
        return f"### Trained recall\n\nNot measured: {summary['left_out']}.\n"
    rows = [[name, summary["windows"][name], cell(row["accuracy"], 3)] for name, row in summary["rows"].items()]
    return (
        f"### Trained recall\n\nTwo-layer models of this model's first mixer with a state, trained for "
        f"{summary['steps']} steps on {summary['pairs']} pairs in {summary['length']} tokens; accuracy on queries out "
        f"of a window's reach. To know the values and not which is whose gives {summary['chance']:.3f}.\n\n"
        + markdown_table(["row", "window", "accuracy"], rows)
    )


def _timescales(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return "### Timescales\n\nNo layer has a state.\n"
    rows = [
        [layer["layer"], head, *(_tokens(values[name]) for name in ("p10", "median", "p90"))]
        for layer in layers
        for head, values in enumerate(layer["heads"])
    ]
    table = markdown_table(["layer", "head", "10th percentile", "median", "90th percentile"], rows)
    return f"### Timescales\n\nTokens that the state remembers, 1 / (1 - decay).\n\n{table}"


def _harness(summary: Mapping[str, Any]) -> str:
    names = sorted({(task, metric) for row in summary["rows"].values() for task in row for metric in row[task]})
    rows = [
        [name, *(cell(row.get(task, {}).get(metric), 4) for task, metric in names)]
        for name, row in summary["rows"].items()
    ]
    limit = "" if summary["limit"] is None else f", the first {summary['limit']} examples of each"
    title = f"### lm-evaluation-harness\n\nIntervals are by its standard error{limit}.\n\n"
    return title + markdown_table(["row", *(f"{task} {metric}" for task, metric in names)], rows)


DESCRIPTIONS: dict[str, Callable[[Any], str]] = {
    "nll": _likelihood,
    "recall": _repetition,
    "greedy": _greedy,
    "needle": _needle,
    "mqar": _associations,
    "mqar-train": _mqar_training,
    "timescales": _timescales,
    "lm_eval": _harness,
}


def cell(record: Record, digits: int) -> str:
    """A value and its interval; a dash where there is none."""
    if record is None:
        return "-"
    value, low, high = (record[name] for name in ("value", "low", "high"))
    assert value is not None
    return f"{value:z.{digits}f}" + ("" if low is None or high is None else f" [{low:z.{digits}f}, {high:z.{digits}f}]")


def _tokens(value: float | None) -> str:
    return "never forgets" if value is None else f"{value:,.0f}"
